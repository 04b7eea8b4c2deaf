"""What ``--gpu-plan`` says beside the plan: the longest context of every tier and placement on
this machine, and what could be rented.

Glue between auto's own planner and pure planning. Knows no pytest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from .autoplacement import auto_map
from .given_files import read_catalogue
from .model import cache
from .planbook import PlanBook
from .planning.fit import largest_context
from .planning.longest import longest_balanced
from .planning.rent import rent_table
from .records.automap import AutoMap
from .records.machine import Machine
from .records.plan import LongestContext, Tier
from .records.rent import SHOWN, RentRow
from .records.tiers import GPU_TIERS


def longest_contexts(
    book: PlanBook, tiers: Sequence[Tier] = GPU_TIERS
) -> tuple[LongestContext, ...]:
    """A row for each tier and placement, the best tier first, and one for what expandable segments
    would make of balanced; () without a GPU. Takes seconds, many plans are made; from the disk
    cache if it is there."""
    machine, settings = book.machine, book.settings
    if not machine.visible:
        return ()
    maps = {tier: auto_map(book.resolved, book.architecture(tier), machine) for tier in tiers}
    chosen = book.chosen
    return cache.longest(
        {
            "config": dict(book.resolved.config_dict),
            "dtype": settings.dtype,
            "weights": book.weights,
            "gpus": [(gpu.free_bytes, gpu.capability) for gpu in machine.visible_gpus],
            "expandable_segments": machine.expandable_segments,
            "auto": {tier: (dict(auto.device_map), auto.refusal) for tier, auto in maps.items()},
            "chosen": (chosen.architecture.tier, chosen.placement, chosen.fits),
            "context_tokens": settings.context,
            "batch": settings.batch,
        },
        lambda: _longest(book, maps),
    )


def _longest(book: PlanBook, maps: Mapping[Tier, AutoMap]) -> tuple[LongestContext, ...]:
    rows: list[LongestContext] = []
    for tier, mapped in maps.items():
        auto = _auto(book, tier, mapped)
        rows.append(LongestContext(tier=tier, placement="auto", tokens=auto))
        tokens = _balanced(book, tier, book.machine, known=auto)
        rows.append(LongestContext(tier=tier, placement="balanced", tokens=tokens))
        if not book.machine.expandable_segments:
            grows = dataclasses.replace(book.machine, expandable_segments=True)
            tokens = _balanced(book, tier, grows, known=tokens)
            rows.append(
                LongestContext(
                    tier=tier, placement="balanced", tokens=tokens, expandable_segments=True
                )
            )
    return tuple(rows)


def _auto(book: PlanBook, tier: Tier, auto: AutoMap) -> int:
    architecture = book.architecture(tier)
    if auto.refusal is not None:
        return 0
    chosen = book.chosen
    same = (chosen.architecture.tier, chosen.placement) == (tier, "auto")
    return largest_context(
        architecture,
        auto.device_map,
        book.machine,
        batch=book.settings.batch,
        known=chosen.context_tokens if same and chosen.fits else 0,
        weights=book.weights,
    )


def _balanced(book: PlanBook, tier: Tier, machine: Machine, *, known: int) -> int:
    plan = longest_balanced(
        book.architecture(tier),
        machine,
        batch=book.settings.batch,
        near=book.settings.context,
        known=known,
        spread=book.spread,
    )
    return 0 if plan is None else plan.context_tokens


def rentable(book: PlanBook) -> tuple[RentRow, ...]:
    """What could be rented for this model and context, by price, as many rows of every tier as
    are shown; from the disk cache if it is there."""
    settings = book.settings
    size = {"context_tokens": settings.context, "batch": settings.batch}
    grows = book.machine.expandable_segments
    catalogue = read_catalogue(settings.catalogue)

    def compute() -> tuple[RentRow, ...]:
        architectures = {tier: book.architecture(tier) for tier in GPU_TIERS}
        return rent_table(
            architectures, **size, catalogue=catalogue, expandable_segments=grows, most=SHOWN
        )

    return cache.rent(
        {
            "config": dict(book.resolved.config_dict),
            "dtype": settings.dtype,
            "catalogue": [dataclasses.asdict(row) for row in catalogue],
            **size,
            "expandable_segments": grows,
        },
        compute,
    )
