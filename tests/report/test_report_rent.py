"""The table of what to rent: whose prices they are; numbers of any size are shown, none as 0."""

from __future__ import annotations

from dataclasses import replace

import pytest
from report_examples import plan

from pytest_multigpu.records.rent import RentRow
from pytest_multigpu.report.rent import rent_lines
from pytest_multigpu.units import GIB

H100 = RentRow(
    gpu="H100",
    count=2,
    tier="8bit",
    peak_bytes=60 * GIB,
    free_bytes=79 * GIB,
    tokens_per_second=2.0,
    price_usd_hour=4.8,
    price_guessed="2026-11",
    usd_per_million_tokens=666.7,
)


@pytest.mark.parametrize(
    ("price", "speed", "million", "shown"),
    [
        (2.4, 10.4, 64.1, "2.40 10 64"),
        (1.005, 9.95, 9.95, "1.00 10 10"),
        (0.1, 9.94, 9.94, "0.10 9.9 9.9"),
        (0.0999, 0.04, 0.4, "0.1 0.04 0.4"),
        (0.004, 1.0, 0.0049, "0.004 1 0.0049"),
        (1e-6, 12000.0, 2.3e-11, "1e-06 12000 2.3e-11"),
    ],
)
def test_small_numbers_are_not_nothing(
    price: float, speed: float, million: float, shown: str
) -> None:
    row = replace(
        H100, price_usd_hour=price, tokens_per_second=speed, usd_per_million_tokens=million
    )
    *_, head, line = [one.text.split() for one in rent_lines([row], plan())]
    assert head[:2] == ["rent", "tier"]
    cents, tokens, dollars = shown.split()
    assert line == ["2xH100", "8bit", cents, "19.0", tokens, dollars]


OWN = replace(H100, gpu="A40", price_guessed=None)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            [H100],
            "prices are indications, guessed in 2026-11, not looked up; "
            "give yours with --gpu-catalogue",
        ),
        ([OWN, replace(OWN, tier="4bit")], "prices are those of --gpu-catalogue"),
        (
            [OWN, H100, replace(OWN, tier="4bit"), replace(OWN, gpu="L4")],
            "prices of A40, L4 are those of --gpu-catalogue, the others indications, "
            "guessed in 2026-11, not looked up",
        ),
        # Of rows that are not shown nothing is said.
        ([*[H100] * 6, OWN], "prices are indications, guessed in 2026-11, not looked up; "
            "give yours with --gpu-catalogue"),
    ],
)  # fmt: skip
def test_whose_prices_and_of_when(rows: list[RentRow], said: str) -> None:
    asked = plan()
    assert [line.text for line in rent_lines(rows, asked)][:3] == [
        "",
        f"what to rent for {asked.context_tokens} tokens x {asked.batch} with "
        "--gpu-placement=balanced, the 6 cheapest of each tier; speeds are estimates",
        said,
    ]


def test_nothing_to_rent_is_said() -> None:
    asked = plan()
    assert [line.text for line in rent_lines([], asked)] == [
        "",
        "nothing to rent: no 16 GPUs or fewer that have a price fit "
        f"{asked.context_tokens} tokens x {asked.batch}",
    ]
