"""The table of what to rent: numbers of any size are shown, none as 0."""

from __future__ import annotations

import pytest
from report_examples import plan

from pytest_multigpu.records.rent import RentRow
from pytest_multigpu.report.rent import rent_lines
from pytest_multigpu.units import GIB


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
    row = RentRow(
        gpu="H100",
        count=2,
        tier="8bit",
        peak_bytes=60 * GIB,
        free_bytes=79 * GIB,
        tokens_per_second=speed,
        price_usd_hour=price,
        usd_per_million_tokens=million,
    )
    *_, head, line = [one.text.split() for one in rent_lines([row], plan())]
    assert head[:2] == ["rent", "tier"]
    cents, tokens, dollars = shown.split()
    assert line == ["2xH100", "8bit", cents, "19.0", tokens, dollars]
