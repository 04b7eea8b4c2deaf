"""What to rent: rows fit, are sorted by price, and the numbers follow from each other."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pytest_multigpu.planning.catalogue import find
from pytest_multigpu.planning.rent import rent_table, runs_on, tokens_per_second
from pytest_multigpu.records.plan import Architecture, Tier

Make = Callable[..., Architecture]


def test_the_table(make_llama: Make) -> None:
    tiers: dict[Tier, Architecture] = {tier: make_llama(tier) for tier in ("16bit", "8bit", "4bit")}
    rows = rent_table(tiers, context_tokens=4096, batch=1)
    by = {(row.gpu, row.tier): row for row in rows}
    assert by["H100", "16bit"].count == 2
    assert by["H200", "16bit"].count == 1
    assert by["A6000", "4bit"].spec == "1xA6000"
    assert by["H100", "8bit"].count == 1
    assert ("T4", "4bit") not in by  # no bfloat16
    assert [row.price_usd_hour for row in rows] == sorted(row.price_usd_hour for row in rows)
    for row in rows:
        assert row.headroom_bytes >= 0
        a_token = row.price_usd_hour / 3600 / row.tokens_per_second
        assert row.usd_per_million_tokens == pytest.approx(a_token * 1e6)


def test_speeds_are_near_the_measured_ones(make_llama: Make) -> None:
    # Measured, batch 1: 16 bit 10.0 on 4 x H100 and 12.4 on one H200; nf4 9.1, int8 1.8.
    h100, h200 = find("H100"), find("H200")
    assert h100 is not None
    assert h200 is not None
    assert tokens_per_second(make_llama(), h100, 4) == pytest.approx(10.0, rel=0.1)
    assert tokens_per_second(make_llama(), h200, 1) == pytest.approx(12.4, rel=0.1)
    assert tokens_per_second(make_llama("4bit"), h100, 4) == pytest.approx(9.1, rel=0.1)
    assert tokens_per_second(make_llama("8bit"), h100, 4) == pytest.approx(1.8, rel=0.1)


def test_slow_memory_sets_the_speed(make_llama: Make) -> None:
    l4 = find("L4")
    assert l4 is not None
    read = 141_107_412_992 - 2_101_346_304
    assert tokens_per_second(make_llama(), l4, 8) == pytest.approx(300e9 * 0.8 / read)


def test_what_a_card_can_compute(make_llama: Make) -> None:
    v100, t4 = find("V100"), find("T4")
    assert v100 is not None
    assert t4 is not None
    half = make_llama("8bit", size=4)
    assert not runs_on(v100, half)
    assert runs_on(t4, half)
    assert not runs_on(t4, make_llama())
