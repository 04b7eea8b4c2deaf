"""Free VRAM: what is worth waiting for, who holds it, what to do. Limits to the byte."""

from __future__ import annotations

import pytest

from pytest_multigpu.judging.vram import (
    HELD_BY_A_DESKTOP,
    HELD_LIMIT,
    describe_holders,
    judge_free_memory,
    lacks_memory,
    wanted_bytes,
)
from pytest_multigpu.records.check import Record
from pytest_multigpu.records.health import FreeMemory, Holder
from pytest_multigpu.records.machine import Gpu, Machine
from pytest_multigpu.units import GIB

TOTAL, RESERVED = 80 * GIB, GIB // 2
USABLE = TOTAL - RESERVED
MOST_HELD = TOTAL // 4
"""What others may hold beside a plan that fits."""


def row(used: int, *holders: Holder, problem: str | None = None) -> FreeMemory:
    return FreeMemory(
        gpu=0,
        total_bytes=TOTAL,
        used_bytes=used,
        reserved_bytes=RESERVED,
        free_bytes=USABLE - used,
        holders=holders,
        problem=problem,
    )


def judge(found: FreeMemory, need: int | None, *, fits: bool = True, waited: float = 0.0) -> Record:
    gpu = Gpu(index=0, cuda_index=0, uuid="GPU-0", name="x", total_bytes=TOTAL, free_bytes=0)
    machine = Machine(gpus=(gpu,), visible=(0,))
    needs = {} if need is None else {0: need}
    (record,) = judge_free_memory(machine, [found], needs, plan_fits=fits, waited=waited)
    return record


@pytest.mark.parametrize(
    ("used", "need", "lacks"),
    [
        (1, USABLE, True),
        (0, USABLE, False),
        (1, USABLE - 1, False),
        (1, USABLE + 1, False),  # too small even when idle
        (HELD_LIMIT + 1, None, False),
        (MOST_HELD, None, False),
        (MOST_HELD + 1, None, True),
    ],
)
def test_waiting_helps_a_gpu_that_is_held(used: int, need: int | None, lacks: bool) -> None:
    assert lacks_memory(row(used), need, plan_fits=True) is lacks


@pytest.mark.parametrize(("used", "lacks"), [(HELD_LIMIT, False), (HELD_LIMIT + 1, True)])
def test_waiting_may_help_a_plan_that_does_not_fit(used: int, lacks: bool) -> None:
    assert lacks_memory(row(used), None, plan_fits=False) is lacks
    assert not lacks_memory(row(used, problem="GPU is lost"), None, plan_fits=False)


@pytest.mark.parametrize(
    ("need", "wanted"),
    [
        (GIB, USABLE - TOTAL // 4),
        (USABLE, USABLE),
        (USABLE + 1, USABLE - GIB),
        (None, USABLE - GIB),
    ],
)
def test_how_much_to_wait_for(need: int | None, wanted: int) -> None:
    assert wanted_bytes(row(0), need) == wanted
    small = FreeMemory(gpu=0, total_bytes=GIB // 4, used_bytes=0, free_bytes=0)
    assert wanted_bytes(small, None) == 0


@pytest.mark.parametrize(("more", "lacks"), [(0, False), (1, True)])
def test_a_small_cards_desktop_may_hold_more_than_its_share(more: int, lacks: bool) -> None:
    used = HELD_BY_A_DESKTOP + more
    small = FreeMemory(
        gpu=0, total_bytes=8 * GIB, used_bytes=used, free_bytes=8 * GIB - used, reserved_bytes=0
    )
    assert lacks_memory(small, GIB, plan_fits=True) is lacks
    assert lacks_memory(small, small.free_bytes + 1, plan_fits=True)
    assert wanted_bytes(small, GIB) == 4 * GIB


@pytest.mark.parametrize("need", [None, USABLE])
def test_where_nothing_would_fit_freed_nobody_is_to_blame(need: int | None) -> None:
    assert lacks_memory(row(70 * GIB), need, plan_fits=False)
    assert not lacks_memory(row(70 * GIB), need, plan_fits=False, fits_if_freed=False)


def test_a_lost_gpu_fails_with_its_own_words() -> None:
    record = judge(row(0, problem="GPU is lost"), 5)
    assert (record.outcome, record.reason) == ("failed", "GPU is lost")
    assert (record.expected, record.unit, record.device) == (5, "bytes", "GPU 0")
    assert record.remedy == "reboot the machine, or rent another"


def test_enough_is_told_in_bytes() -> None:
    record = judge(row(GIB), 70 * GIB)
    assert (record.name, record.outcome, record.unit) == ("free VRAM", "passed", "bytes")
    assert (record.expected, record.measured) == (70 * GIB, USABLE - GIB)
    assert (record.reason, record.remedy) == ("", "")


@pytest.mark.parametrize(
    ("waited", "words"), [(0.99, ""), (1.0, " after waiting 1 s"), (60.2, " after waiting 60 s")]
)
def test_a_wait_is_told_from_a_second_on(waited: float, words: str) -> None:
    record = judge(row(70 * GIB), 20 * GIB, waited=waited)
    assert record.reason == (
        f"GPU 0 needs 20.0 GiB free; found 9.5 GiB{words}: "
        "70.0 GiB held by a holder that is not visible from here"
    )
    assert record.remedy == (
        "look outside this container (fuser -v /dev/nvidia*); if nothing shows, "
        "restart the pod or rent another"
    )
    assert (record.outcome, record.expected) == ("failed", 20 * GIB)
    assert (record.measured, record.unit) == (USABLE - 70 * GIB, "bytes")


def test_memory_that_is_held_beside_enough_is_a_warning() -> None:
    two = (
        Holder(gpu=0, pid=7, used_bytes=3 * GIB, name="python", user="alice"),
        Holder(gpu=0, pid=8, used_bytes=None, name="", user=""),
    )
    record = judge(row(4 * GIB, *two), 20 * GIB)
    assert record.outcome == "warned"
    assert record.reason == (
        "GPU 0 has 75.5 GiB of 80.0 GiB free: 4.0 GiB held by "
        "python (PID 7, alice, 3.0 GiB), a process (PID 8)"
    )
    assert record.remedy == "kill 7 8"
    assert describe_holders(two[1:]) == "a process (PID 8)"
