"""Expandable segments: pages, where they are mapped, which block is taken, what goes back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_multigpu.planning.allocator import Held
from pytest_multigpu.planning.balance import balanced_plan
from pytest_multigpu.planning.costs import HOPPER, OTHER, costs_for
from pytest_multigpu.planning.expandable import ExpandableAllocator
from pytest_multigpu.planning.peaks import Predictor
from pytest_multigpu.planning.rent import rent_table
from pytest_multigpu.planning.replay import Loaded
from pytest_multigpu.planning.simulate import simulate
from pytest_multigpu.records.plan import Architecture
from pytest_multigpu.units import MIB

Make = Callable[..., Architecture]


@pytest.mark.parametrize(
    ("size", "reserved"),
    [
        (1, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 1, 20 * MIB),
        (20 * MIB, 20 * MIB),
        (20 * MIB + 1, 40 * MIB),
        (50 * MIB, 60 * MIB),
    ],
)
def test_memory_is_mapped_in_pages(size: int, reserved: int) -> None:
    allocator = ExpandableAllocator()
    allocator.take(size)
    assert allocator.reserved == allocator.peak_reserved == reserved


def test_what_is_left_of_a_page_is_where_the_next_one_begins() -> None:
    allocator = ExpandableAllocator()
    first, second = allocator.take(30 * MIB), allocator.take(30 * MIB)
    assert second.address == first.address + 30 * MIB
    assert allocator.reserved == 60 * MIB


def test_a_large_block_is_split_wherever_512_bytes_are_left() -> None:
    allocator = ExpandableAllocator()
    first = allocator.take(20 * MIB - 512)
    assert first.size == 20 * MIB - 512
    allocator.drop(first)
    assert allocator.take(20 * MIB).size == 20 * MIB
    assert allocator.reserved == 20 * MIB


def test_the_pools_do_not_share() -> None:
    allocator = ExpandableAllocator()
    allocator.drop(allocator.take(100 * MIB))
    allocator.take(100)
    assert allocator.reserved == 102 * MIB


def test_one_that_cannot_grow_is_taken_before_one_that_can() -> None:
    """The last block before unmapped addresses counts as long as it could become."""
    allocator = ExpandableAllocator()
    hole, _, last = allocator.take(60 * MIB), allocator.take(20 * MIB), allocator.take(40 * MIB)
    start = hole.address
    allocator.drop(hole)
    allocator.drop(last)
    # 40 MiB would do, and be nearer to 30 MiB than 60 MiB.
    assert allocator.take(30 * MIB).address == start
    assert allocator.reserved == 120 * MIB


def test_of_many_that_would_do_the_least_is_taken() -> None:
    allocator = ExpandableAllocator()
    sizes = (70, 60, 50, 40)
    blocks = [(allocator.take(size * MIB), allocator.take(20 * MIB))[0] for size in sizes]
    last = allocator.take(30 * MIB)
    starts = [block.address for block in blocks]
    for block in (*blocks, last):
        allocator.drop(block)
    assert [allocator.take(25 * MIB).address for _ in range(2)] == [starts[3], starts[2]]


def test_a_hole_between_two_is_filled_before_the_end_grows() -> None:
    """What lies free on both of its sides counts with it."""
    allocator = ExpandableAllocator()
    first, _ = allocator.take(90 * MIB), allocator.take(10 * MIB)
    start = first.address
    allocator.drop(first)
    low, middle, high = (allocator.take(30 * MIB) for _ in range(3))
    allocator.drop(middle)
    allocator.empty_cache()  # 40 to 60 of 30 to 60 MiB
    assert allocator.reserved == 80 * MIB
    allocator.drop(high)  # 60 to 90, beside it
    allocator.drop(low)
    for one in (allocator.copy(), allocator):
        assert one.take(90 * MIB).address == start
        assert one.reserved == 100 * MIB


def test_growth_begins_in_the_free_block_before_it() -> None:
    allocator = ExpandableAllocator()
    first, last = allocator.take(20 * MIB), allocator.take(40 * MIB)
    allocator.drop(last)
    grown = allocator.take(100 * MIB)
    assert grown.address == first.address + first.size
    assert allocator.reserved == 120 * MIB


def test_pages_given_back_are_mapped_again_first() -> None:
    allocator = ExpandableAllocator()
    hole, kept = allocator.take(60 * MIB), allocator.take(20 * MIB)
    start = hole.address
    allocator.drop(hole)
    allocator.empty_cache()
    assert allocator.reserved == 20 * MIB
    assert allocator.take(61 * MIB).address == kept.address + kept.size
    again = allocator.take(60 * MIB)
    assert again.address == start
    assert allocator.reserved == 20 * MIB + 80 * MIB + 60 * MIB
    # It is beside what was there all the time.
    allocator.drop(again)
    allocator.drop(kept)
    assert allocator.take(80 * MIB).address == start
    assert allocator.reserved == 160 * MIB


def test_only_whole_pages_go_back() -> None:
    allocator = ExpandableAllocator()
    allocator.take(10 * MIB)
    middle, _ = allocator.take(45 * MIB), allocator.take(25 * MIB)
    allocator.drop(middle)  # 10 to 55 of 80 MiB: one whole page, 20 to 40
    allocator.empty_cache()
    assert allocator.reserved == 60 * MIB
    # Both of its ends are still there, and the page between them comes back.
    again = allocator.take(45 * MIB)
    assert (again.address, allocator.reserved) == (middle.address, 80 * MIB)


def test_at_the_limit_whole_free_pages_go_back_once_then_it_is_out_of_memory() -> None:
    allocator = ExpandableAllocator(limit_bytes=100 * MIB)
    allocator.drop(allocator.take(1))
    hole, _ = allocator.take(60 * MIB), allocator.take(20 * MIB)
    allocator.drop(hole)
    allocator.take(61 * MIB)
    # 20 MiB in use, 80 MiB mapped behind it; the hole and the small page went back.
    assert (allocator.reserved, allocator.peak_reserved) == (100 * MIB, 100 * MIB)
    assert allocator.missing_bytes == 0
    allocator.take(20 * MIB)
    assert allocator.missing_bytes == 20 * MIB


def test_what_was_missing_first_is_noted() -> None:
    allocator = ExpandableAllocator(limit_bytes=50 * MIB)
    for _ in range(3):
        allocator.take(40 * MIB)
    assert allocator.missing_bytes == 30 * MIB
    assert allocator.reserved == 120 * MIB


def test_the_least_limit_counts_what_would_go_back() -> None:
    allocator = ExpandableAllocator()
    hole, _ = allocator.take(60 * MIB), allocator.take(20 * MIB)
    allocator.drop(hole)
    allocator.take(100 * MIB)
    assert allocator.peak_reserved == 180 * MIB
    assert allocator.least_limit == 120 * MIB


SIZES = st.one_of(
    st.sampled_from([10 * MIB, 20 * MIB, 40 * MIB, 60 * MIB, 60 * MIB + 512]),
    st.integers(1, 3 * MIB),
    st.integers(1, 90 * MIB),
)
STEPS = st.lists(
    st.tuples(st.sampled_from(["take", "take", "drop", "empty"]), SIZES, st.integers(0, 99)),
    max_size=80,
)
Steps = list[tuple[str, int, int]]
_SLOW = settings(max_examples=200, suppress_health_check=list(HealthCheck), deadline=None)


def _follow(allocator: ExpandableAllocator, steps: Steps) -> list[Held]:
    held: list[Held] = []
    for step in steps:
        _do(allocator, held, *step)
        _check(allocator, held)
    return held


def _do(allocator: ExpandableAllocator, held: list[Held], what: str, size: int, which: int) -> None:
    if what == "take":
        held.append(allocator.take(size))
    elif what == "drop" and held:
        allocator.drop(held.pop(which % len(held)))
    elif what == "empty":
        allocator.empty_cache()


def _check(allocator: ExpandableAllocator, held: list[Held]) -> None:
    """No byte is handed out twice, all of it lies in mapped pages, and neighbours know it."""
    free = [entry[2] for pool in allocator._free for entry in pool]
    regions = [region for pool in allocator._unmapped for region in pool]
    spans = sorted((b.address, b.size, b) for b in [*held, *free, *regions])
    assert all(size > 0 for _, size, _ in spans)
    for (start, size, one), (following, _, other) in pairwise(spans):
        if one.small != other.small:
            continue
        assert start + size == following
        assert one.after is other
        assert other.before is one
        # Free ones would have joined, and so would what is not mapped.
        assert not (one.free and other.free)
        assert one not in regions or other not in regions
    assert allocator.allocated == sum(block.size for block in held)
    assert allocator.reserved == allocator.allocated + sum(block.size for block in free)
    page = {False: 20 * MIB, True: 2 * MIB}
    for region in regions:
        assert region.address % page[region.small] == (1 << 60) % page[True] * region.small
        assert region.size % page[region.small] == 0 or region.after is None


@_SLOW
@given(STEPS)
def test_memory_is_never_lost_or_handed_out_twice(steps: Steps) -> None:
    allocator = ExpandableAllocator()
    for block in _follow(allocator, steps):
        allocator.drop(block)
    allocator.empty_cache()
    assert allocator.reserved == allocator.allocated == 0


@_SLOW
@given(STEPS, STEPS)
def test_a_copy_does_what_the_original_would(before: Steps, then: Steps) -> None:
    first = ExpandableAllocator()
    kept = _follow(first, before)
    twin = first.copy()
    ours: list[Held] = []
    theirs: list[Held] = []
    for allocator, held in ((twin, theirs), (first, ours)):
        for step in then:
            _do(allocator, held, *step)
    assert [block.address for block in ours] == [block.address for block in theirs]
    assert first.reserved == twin.reserved
    assert first.peak_reserved == twin.peak_reserved
    _check(first, kept + ours)


def test_less_is_reserved_and_the_same_is_in_tensors(make_llama: Make) -> None:
    model = make_llama("4bit", layers=2)
    placed = {block.name: 0 for block in model.blocks}
    usual, grown = (
        Loaded(model, placed, {0: costs}).run(context_tokens=6000, batch=3)[0]
        for costs in (HOPPER, replace(HOPPER, expandable_segments=True))
    )
    assert grown.allocated_peak_bytes <= usual.allocated_peak_bytes
    assert grown.peaks.worst_bytes < usual.peaks.worst_bytes


def test_the_machine_says_which_allocator_is_planned_for(make_llama: Make) -> None:
    model = make_llama("4bit", layers=2)
    usual = simulate("1xH100")
    grows = replace(usual, expandable_segments=True)
    sizes = {"context_tokens": 6000, "batch": 3}
    plans = [Predictor(model, {"": 0}, on).plan(**sizes, placement="p") for on in (usual, grows)]
    peaks = [plan.devices[0].peak_bytes for plan in plans]
    assert peaks[1] < peaks[0]
    spread = balanced_plan(model, grows, 6000, 3)
    assert spread is not None
    assert spread.devices[0].peak_bytes == peaks[1]
    # In one order: nothing hangs on what addresses the driver gives.
    free = peaks[1] * 256 // 255 + MIB
    tight = replace(grows, gpus=(replace(grows.gpus[0], free_bytes=free),))
    assert Predictor(model, {"": 0}, tight)._others == ()
    assert Predictor(model, {"": 0}, tight).fit(**sizes).fits
    refused = replace(tight, expandable_segments=False)
    assert not Predictor(model, {"": 0}, refused).fit(**sizes).fits


def test_what_to_rent_is_for_that_allocator_too(make_llama: Make) -> None:
    model = {"4bit": make_llama("4bit", layers=2)}
    usual, grows = (
        rent_table(model, context_tokens=6000, batch=3, expandable_segments=asked)  # type: ignore[arg-type]
        for asked in (False, True)
    )
    assert [row.gpu for row in usual] == [row.gpu for row in grows]
    assert all(g.peak_bytes < u.peak_bytes for u, g in zip(usual, grows, strict=True))


def test_costs_of_a_process_with_expandable_segments() -> None:
    assert costs_for((9, 0), expandable_segments=True) == replace(HOPPER, expandable_segments=True)
    assert costs_for(None, expandable_segments=True) == replace(OTHER, expandable_segments=True)
    assert costs_for((9, 0), expandable_segments=False) is HOPPER
