"""The caching allocator's rules, at and around each boundary."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_multigpu.planning.allocator import (
    OTHER_ORDERS,
    TOP_DOWN,
    Allocator,
    Held,
)
from pytest_multigpu.units import MIB


@pytest.mark.parametrize(
    ("size", "reserved"),
    [
        (1, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 1, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (10 * MIB + 1, 12 * MIB),
        (12 * MIB, 12 * MIB),
    ],
)
def test_segments(size: int, reserved: int) -> None:
    allocator = Allocator()
    allocator.take(size)
    assert allocator.reserved == reserved


@pytest.mark.parametrize(
    ("left", "kept"), [(MIB - 512, 12 * MIB), (MIB, 12 * MIB), (MIB + 512, 11 * MIB - 512)]
)
def test_a_large_block_is_split_only_if_more_than_a_mib_is_left(left: int, kept: int) -> None:
    allocator = Allocator()
    allocator.drop(allocator.take(12 * MIB))
    assert allocator.take(12 * MIB - left).size == allocator.allocated == kept


def test_a_small_block_is_split_down_to_512_bytes() -> None:
    allocator = Allocator()
    for _ in range(4096):
        allocator.take(1)
    assert (allocator.allocated, allocator.reserved) == (2 * MIB, 2 * MIB)


def test_freed_neighbours_join() -> None:
    allocator = Allocator()
    allocator.drop(allocator.take(60 * MIB))
    three = [allocator.take(20 * MIB) for _ in range(3)]
    for block in (three[0], three[2], three[1]):
        allocator.drop(block)
    allocator.take(60 * MIB)
    assert allocator.reserved == 60 * MIB


def test_the_smallest_sufficient_block_is_taken() -> None:
    allocator = Allocator()
    large, small = allocator.take(40 * MIB), allocator.take(20 * MIB)
    allocator.drop(large)
    allocator.drop(small)
    allocator.take(20 * MIB)
    allocator.take(40 * MIB)
    assert allocator.reserved == 60 * MIB


def test_at_the_limit_free_segments_are_given_back_once_then_it_is_out_of_memory() -> None:
    allocator = Allocator(limit_bytes=100 * MIB)
    allocator.drop(allocator.take(60 * MIB))
    allocator.take(100 * MIB)
    assert (allocator.reserved, allocator.peak_reserved) == (100 * MIB, 100 * MIB)
    assert allocator.missing_bytes == 0
    allocator.take(1)
    assert allocator.missing_bytes == 2 * MIB


def test_a_segment_in_use_stays_when_the_cache_is_emptied() -> None:
    allocator = Allocator()
    allocator.drop(allocator.take(60 * MIB))
    kept = allocator.take(20 * MIB)
    allocator.empty_cache()
    assert allocator.reserved == 60 * MIB
    allocator.drop(kept)
    allocator.empty_cache()
    assert allocator.reserved == 0


def test_the_peak_knows_how_much_of_it_was_kv_and_logits() -> None:
    allocator = Allocator()
    allocator.kv = 3
    allocator.drop(allocator.take(20 * MIB))
    allocator.kv, allocator.logits = 5, 7
    allocator.take(10 * MIB)
    assert (allocator.peak_kv, allocator.peak_logits) == (3, 0)
    allocator.take(20 * MIB)
    assert (allocator.peak_kv, allocator.peak_logits) == (5, 7)
    allocator.kv, reserved = 1, allocator.peak_reserved
    allocator.empty_cache()
    allocator.restart_allocated_peak()
    assert (allocator.peak_kv, allocator.peak_logits) == (1, 7)
    assert (allocator.peak_allocated, allocator.peak_reserved) == (30 * MIB, reserved)
    allocator.restart_peaks()
    assert allocator.peak_reserved == allocator.reserved


def test_what_was_given_back_is_asked_for_again() -> None:
    allocator = Allocator()
    allocator.drop(allocator.take(60 * MIB))
    kept = allocator.take(20 * MIB)
    allocator.drop(allocator.take(1))
    allocator.empty_cache()
    assert allocator.reserved == 60 * MIB
    # The rest of the segment that is in use is still there, the small one is not.
    allocator.take(40 * MIB)
    assert allocator.reserved == 60 * MIB
    allocator.take(1)
    assert allocator.reserved == 62 * MIB
    del kept


def test_a_joined_block_begins_where_its_first_part_did() -> None:
    allocator = Allocator()
    allocator.drop(allocator.take(60 * MIB))
    first, second, third = (allocator.take(20 * MIB) for _ in range(3))
    start = first.address
    allocator.drop(first)
    allocator.drop(second)
    joined = allocator.take(40 * MIB)
    assert (joined.address, joined.address + joined.size) == (start, third.address)


def test_nothing_is_held_at_first() -> None:
    allocator = Allocator()
    assert (allocator.reserved, allocator.peak_reserved, allocator.least_limit) == (0, 0, 0)
    assert (allocator.allocated, allocator.peak_allocated) == (0, 0)


# Whether the machine is busy says nothing about the allocator.
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.tuples(st.integers(1, 30 * MIB), st.integers(0, 10), st.booleans()), max_size=60)
)
def test_memory_is_never_lost_or_handed_out_twice(steps: list[tuple[int, int, bool]]) -> None:
    allocator = Allocator()
    held: list[Held] = []
    for size, which, give_back in steps:
        if give_back and held:
            allocator.drop(held.pop(which % len(held)))
        else:
            held.append(allocator.take(size))
        spans = sorted((block.address, block.address + block.size) for block in held)
        assert all(a[1] <= b[0] for a, b in pairwise(spans))
        assert allocator.allocated == sum(block.size for block in held) <= allocator.reserved
    for block in held:
        allocator.drop(block)
    allocator.empty_cache()
    assert (allocator.reserved, allocator.allocated) == (0, 0)


def test_the_least_limit_counts_what_would_be_given_back() -> None:
    allocator = Allocator()
    allocator.drop(allocator.take(60 * MIB))
    kept = allocator.take(20 * MIB)
    # 20 of the 60 are in use now: that segment could not be given back.
    allocator.take(100 * MIB)
    assert (allocator.reserved, allocator.least_limit) == (160 * MIB, 160 * MIB)
    allocator = Allocator()
    allocator.drop(allocator.take(60 * MIB))
    allocator.take(100 * MIB)
    assert (allocator.reserved, allocator.least_limit) == (160 * MIB, 100 * MIB)
    limited = Allocator(limit_bytes=allocator.least_limit)
    limited.drop(limited.take(60 * MIB))
    limited.take(100 * MIB)
    assert limited.reserved == limited.least_limit == 100 * MIB
    del kept


def test_two_go_on_from_one_state() -> None:
    first = Allocator()
    first.take(20 * MIB)
    gap, end = first.take(30 * MIB), first.take(20 * MIB)
    first.drop(gap)
    second = first.copy()
    state = (first.reserved, first.allocated, first.peak_allocated)
    assert state == (second.reserved, second.allocated, second.peak_allocated)
    # The gap is one segment in each; what one takes from it the other still has.
    one = first.take(28 * MIB)
    assert (first.reserved, second.allocated) == (state[0], state[1])
    two = second.take(30 * MIB)
    assert second.reserved == state[0]
    assert (one.address, one.size, two.size) == (two.address, 28 * MIB, 30 * MIB)
    first.drop(one)
    first.empty_cache()
    assert (first.reserved, second.reserved) == (40 * MIB, 70 * MIB)
    del end


@given(
    st.lists(st.tuples(st.integers(1, 30 * MIB), st.integers(0, 10), st.booleans()), max_size=60),
    st.integers(0, 30),
)
def test_a_copy_does_what_the_original_would(steps: list[tuple[int, int, bool]], at: int) -> None:
    """After ``at`` steps: from there on, nothing that was handed out before is given back."""

    def go_on(allocator: Allocator) -> list[tuple[int, int]]:
        held: list[Held] = []
        seen = []
        for size, which, give_back in steps[at:]:
            if give_back and held:
                allocator.drop(held.pop(which % len(held)))
            else:
                held.append(allocator.take(size))
            seen.append((allocator.reserved, allocator.allocated))
        return [*seen, (allocator.peak_reserved, allocator.least_limit)]

    original = Allocator()
    held: list[Held] = []
    for size, which, give_back in steps[:at]:
        if give_back and held:
            original.drop(held.pop(which % len(held)))
        else:
            held.append(original.take(size))
    copies = [original.copy(), original.copy()]
    expected = go_on(original)
    assert [go_on(twin) for twin in copies] == [expected, expected]


@pytest.mark.parametrize(
    ("size", "top_down", "taken"),
    [
        (64 * MIB, TOP_DOWN, 2),
        (3072 * MIB, TOP_DOWN, 2),
        # Some top down; none.
        (510 * MIB, OTHER_ORDERS[0], 0),
        (512 * MIB, OTHER_ORDERS[0], 2),
        (3072 * MIB, OTHER_ORDERS[1], 0),
    ],
)
def test_of_equal_segments_the_one_at_the_lowest_address(
    size: int, top_down: int, taken: int
) -> None:
    allocator = Allocator(top_down=top_down)
    blocks = [allocator.take(size) for _ in range(3)]
    for block in blocks:
        allocator.drop(block)
    assert allocator.take(size) is blocks[taken]


@pytest.mark.parametrize("top_down", [TOP_DOWN, *OTHER_ORDERS])
def test_no_two_segments_overlap(top_down: int) -> None:
    allocator = Allocator(top_down=top_down)
    sizes = [64 * MIB, 512 * MIB, 3 * MIB, 1024 * MIB, 100, 514 * MIB, 500 * MIB]
    taken = sorted((allocator.take(size) for size in sizes), key=lambda block: block.address)
    for one, following in pairwise(taken):
        end = one.address + one.size + (0 if one.after is None else one.after.size)
        assert end <= following.address


def test_peaks_start_again_at_what_is_there() -> None:
    allocator = Allocator()
    allocator.kv = 5
    first, second = allocator.take(64 * MIB), allocator.take(32 * MIB)
    assert (allocator.peak_allocated, allocator.peak_kv) == (96 * MIB, 5)
    allocator.drop(first)
    allocator.empty_cache()
    allocator.kv = 3
    allocator.restart_peaks()
    found = allocator.peak_reserved, allocator.peak_allocated, allocator.peak_kv
    assert found == (32 * MIB, 32 * MIB, 3)
    allocator.drop(second)


def test_the_last_byte_of_the_limit_can_be_had_once_the_rest_is_given_back() -> None:
    allocator = Allocator(64 * MIB)
    allocator.drop(allocator.take(40 * MIB))
    assert allocator.take(64 * MIB).size == 64 * MIB
    assert allocator.missing_bytes == 0
    allocator.take(20 * MIB)
    assert allocator.missing_bytes == 20 * MIB


def test_what_was_missing_first_is_noted_and_goes_on() -> None:
    allocator = Allocator(limit_bytes=50 * MIB)
    allocator.take(40 * MIB)
    assert allocator.missing_bytes == 0
    for _ in range(2):
        allocator.take(40 * MIB)
    assert (allocator.missing_bytes, allocator.limit_bytes) == (30 * MIB, None)
    assert allocator.reserved == 120 * MIB
