"""A plan is said to fit only with something to spare: predictions are not exact to the byte."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from pytest_multigpu.planning import peaks
from pytest_multigpu.planning.costs import SPARE_SHARE
from pytest_multigpu.planning.peaks import predict
from pytest_multigpu.planning.simulate import simulate
from pytest_multigpu.records.machine import Machine
from pytest_multigpu.records.plan import Architecture, Plan
from pytest_multigpu.units import gib

PlanOn = Callable[[int], Plan]


@pytest.fixture
def plan_on(make_llama: Callable[..., Architecture]) -> PlanOn:
    """The first layers of a 16-bit 70B on one GPU with so many free bytes."""
    architecture, card = make_llama("16bit", layers=12), simulate("1xH200").gpus[0]

    def plan(free_bytes: int) -> Plan:
        return predict(
            architecture,
            {"": 0},
            Machine(gpus=(replace(card, free_bytes=free_bytes),), visible=(0,)),
            context_tokens=2048,
            batch=1,
            weights="synthetic",
            placement="balanced",
        )

    return plan


@pytest.fixture
def least(plan_on: PlanOn, monkeypatch: pytest.MonkeyPatch) -> int:
    """The fewest free bytes on which it fits with nothing to spare; from here on some is kept."""
    high = plan_on(200 << 30).devices[0].peak_bytes
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if plan_on(middle).fits else (middle, high)
    monkeypatch.setattr(peaks, "SPARE_SHARE", SPARE_SHARE)
    return high


def test_the_last_byte_is_refused(plan_on: PlanOn, least: int) -> None:
    assert not plan_on(least).fits


def test_a_256th_to_spare_is_enough_and_less_is_not(plan_on: PlanOn, least: int) -> None:
    enough = least * 256 // 255 + 1
    assert plan_on(enough).fits
    assert not plan_on(enough - least // 1000).fits


def test_the_text_says_what_is_kept_spare(plan_on: PlanOn, least: int) -> None:
    peak = plan_on(200 << 30).devices[0].peak_bytes
    close = plan_on(least - 1)
    lacking = close.devices[0].peak_bytes - (least - 1)
    assert close.reasons == (
        f"GPU 0 lacks {gib(lacking)}: it would peak at {gib(peak)} of {gib(least - 1)} free "
        "with 2048 tokens x 1",
    )
    tight = plan_on(peak + 1000)
    kept = int((peak + 1000) * SPARE_SHARE)
    assert not tight.fits
    assert tight.reasons == (
        f"GPU 0 lacks {gib(kept - 1000)}: it would peak at {gib(peak)} of {gib(peak + 1000)} free, "
        f"too close to the last byte ({gib(kept)} are kept spare) with 2048 tokens x 1",
    )
    # Exactly its peak, and almost as much more as is kept.
    for more in (0, kept * 2 // 3):
        found = plan_on(peak + more)
        spare = int((peak + more) * SPARE_SHARE)
        assert found.reasons == (
            f"GPU 0 lacks {gib(spare - more)}: it would peak at {gib(peak)} of {gib(peak + more)} "
            f"free, too close to the last byte ({gib(spare)} are kept spare) with 2048 tokens x 1",
        )
