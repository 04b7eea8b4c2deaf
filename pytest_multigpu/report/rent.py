"""What to rent, as lines: the answer to "A6000s, A100s or H100s, how many, which precision?"

::

    prices are indications, guessed in 2026-11, not looked up; give yours with --gpu-catalogue
    rent         tier    $/h  headroom GiB  tokens/s  $ per million tokens
    3xA100-80GB  16bit  4.20          30.8        10                 116.7
    2xH100       8bit   4.80          40.1         2                 666.7

Imports records and units.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..records.plan import TIERS, Plan
from ..records.rent import MAX_COUNT, SHOWN, RentRow
from ..units import GIB
from .tables import Line, table_lines


def rent_lines(rows: Sequence[RentRow], plan: Plan, *, most: int = SHOWN) -> list[Line]:
    """For the plan's model and context, the best tier first, ``most`` rows of each by price."""
    shown = [
        row for tier in reversed(TIERS) for row in [one for one in rows if one.tier == tier][:most]
    ]
    if not shown:
        asked = f"{plan.context_tokens} tokens x {plan.batch}"
        none = f"nothing to rent: no {MAX_COUNT} GPUs or fewer that have a price fit {asked}"
        return [Line(""), Line(none)]
    cells = [
        (
            row.spec,
            row.tier,
            _price(row.price_usd_hour),
            f"{row.headroom_bytes / GIB:.1f}",
            _whole(row.tokens_per_second),
            _whole(row.usd_per_million_tokens),
        )
        for row in shown
    ]
    head = ("rent", "tier", "$/h", "headroom GiB", "tokens/s", "$ per million tokens")
    return [
        Line(""),
        Line(
            f"what to rent for {plan.context_tokens} tokens x {plan.batch} with "
            f"--gpu-placement=balanced, the {most} cheapest of each tier; speeds are estimates"
        ),
        Line(_origin(shown)),
        *table_lines(head, cells, right=range(2, 6)),
    ]


def _origin(shown: Sequence[RentRow]) -> str:
    """Whose prices these are, and of when: no date of ours on what somebody gave."""
    guessed = [row.price_guessed for row in shown if row.price_guessed is not None]
    given = dict.fromkeys(row.gpu for row in shown if row.price_guessed is None)
    if not guessed:
        return "prices are those of --gpu-catalogue"
    what = f"indications, guessed in {guessed[0]}, not looked up"
    if not given:
        return f"prices are {what}; give yours with --gpu-catalogue"
    return f"prices of {', '.join(given)} are those of --gpu-catalogue, the others {what}"


def _price(usd: float) -> str:
    """Cents, and below ten of them two digits, however small."""
    return f"{usd:.2f}" if usd >= 0.1 else f"{usd:.2g}"


def _whole(value: float) -> str:
    """No digit after the point from 10 up; below, two digits: never ``0``."""
    return f"{value:.0f}" if value >= 9.95 else f"{value:.2g}"
