"""The balanced partition: equal to brute force, on unequal cards, tied weights together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from itertools import combinations_with_replacement

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_multigpu.planning.partition import (
    Card,
    contiguous,
    place_groups,
    units,
)
from pytest_multigpu.records.plan import Architecture


def worst(sizes: list[int], cards: list[Card], counts: list[int]) -> Fraction:
    start, found = 0, Fraction(0)
    for card, count in zip(cards, counts, strict=True):
        if count:
            if card.free_bytes == 0:
                return Fraction(10**30)
            need = card.base_bytes + sum(sizes[start : start + count])
            found = max(found, Fraction(need, card.free_bytes))
        start += count
    return found


def brute_force(sizes: list[int], cards: list[Card]) -> Fraction:
    n = len(sizes)
    return min(
        worst(sizes, cards, [b - a for a, b in zip((0, *cuts), (*cuts, n), strict=True)])
        for cuts in combinations_with_replacement(range(n + 1), len(cards) - 1)
    )


CARDS = st.lists(
    st.builds(
        Card,
        free_bytes=st.one_of(st.integers(1, 50), st.integers(0, 10**12)),
        base_bytes=st.one_of(st.integers(0, 20), st.integers(0, 10**11)),
    ),
    min_size=1,
    max_size=4,
).filter(lambda cards: any(card.free_bytes for card in cards))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.one_of(st.integers(0, 9), st.integers(0, 10**11)), min_size=1, max_size=9), CARDS
)
def test_the_partition_equals_brute_force(sizes: list[int], cards: list[Card]) -> None:
    counts = contiguous(sizes, cards)
    assert len(counts) == len(cards)
    assert sum(counts) == len(sizes)
    assert worst(sizes, cards, counts) == brute_force(sizes, cards)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=8), CARDS, st.integers(0, 3))
def test_more_memory_is_never_worse(sizes: list[int], cards: list[Card], which: int) -> None:
    which %= len(cards)
    larger = list(cards)
    larger[which] = replace(cards[which], free_bytes=cards[which].free_bytes * 2 + 1)
    before = worst(sizes, cards, contiguous(sizes, cards))
    assert worst(sizes, larger, contiguous(sizes, larger)) <= before


def test_among_equals_the_most_even_partition() -> None:
    # The first item alone decides the worst: the others must not pile up on one card.
    assert contiguous([10, 2, 2, 2, 2], [Card(free_bytes=100)] * 3) == [1, 2, 2]


@pytest.mark.parametrize("sizes", [[], [1]])
def test_nothing_to_place_or_nowhere(sizes: list[int]) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - its whole text is below
        contiguous(sizes, [Card(free_bytes=0)] if sizes else [Card(free_bytes=1)])
    assert str(error.value) == "nothing to place, or nowhere to place it"


def squares(sizes: list[int], cards: list[Card], counts: list[int]) -> float:
    start, total = 0, 0.0
    for card, count in zip(cards, counts, strict=True):
        if count:
            need = card.base_bytes + sum(sizes[start : start + count])
            total += (need / card.free_bytes) ** 2
        start += count
    return total


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=8),
    st.lists(
        st.builds(Card, free_bytes=st.integers(1, 30), base_bytes=st.integers(0, 9)),
        min_size=1,
        max_size=4,
    ),
)
def test_of_the_best_partitions_it_is_the_most_even(sizes: list[int], cards: list[Card]) -> None:
    n, best = len(sizes), brute_force(sizes, cards)
    ways = [
        [b - a for a, b in zip((0, *cuts), (*cuts, n), strict=True)]
        for cuts in combinations_with_replacement(range(n + 1), len(cards) - 1)
    ]
    least = min(squares(sizes, cards, way) for way in ways if worst(sizes, cards, way) == best)
    assert squares(sizes, cards, contiguous(sizes, cards)) == pytest.approx(least, rel=1e-9)


def test_a_card_costs_nothing_unless_said() -> None:
    """With a byte more or less on either card another partition would be best."""
    assert contiguous([1, 1, 6], [Card(free_bytes=2), Card(free_bytes=11)]) == [1, 2]


def test_a_card_without_memory_gets_nothing() -> None:
    cards = [Card(free_bytes=10), Card(free_bytes=0), Card(free_bytes=10), Card(free_bytes=-1)]
    assert contiguous([3, 3, 3, 3], cards) == [2, 0, 2, 0]


def test_a_card_with_a_costly_start_is_left_empty() -> None:
    cards = [Card(free_bytes=100), Card(free_bytes=100, base_bytes=90)]
    assert contiguous([5, 5, 5], cards) == [3, 0]
    assert contiguous([50, 1, 60], [Card(free_bytes=100), Card(free_bytes=100, base_bytes=20)]) == [
        2,
        1,
    ]


def test_blocks_that_stay_together(make_llama: Callable[..., Architecture]) -> None:
    model = make_llama(layers=3)
    rotary = replace(model.blocks[0], name="model.rotary_emb", kind="other")
    listed = replace(model, blocks=(*model.blocks, rotary))
    assert [[block.name for block in group] for group in units(listed)] == [
        ["model.embed_tokens", "model.layers.0", "model.rotary_emb"],
        ["model.layers.1"],
        ["model.layers.2", "model.norm", "lm_head"],
    ]
    one = replace(model, blocks=(model.blocks[0], model.blocks[1], *model.blocks[-2:]))
    assert [len(group) for group in units(one)] == [4]
    without = replace(model, blocks=(model.blocks[0], *model.blocks[-2:]))
    assert units(without) == [list(without.blocks)]


def test_groups_in_turn_and_tied_weights_with_their_owner(
    make_llama: Callable[..., Architecture],
) -> None:
    model = make_llama(layers=4)
    groups = units(model)
    placed = place_groups(model, groups, [1, 0, 3])
    assert list(placed.values()) == [0, 0, 2, 2, 2, 2, 2]
    assert list(placed) == [block.name for block in model.blocks]
    head = replace(model.blocks[-1], tied_to="model.embed_tokens")
    tied = replace(model, blocks=(*model.blocks[:-1], head))
    assert place_groups(tied, units(tied), [2, 2])["lm_head"] == 0
    unknown = replace(head, tied_to="elsewhere")
    tied = replace(model, blocks=(*model.blocks[:-1], unknown))
    assert place_groups(tied, units(tied), [2, 2])["lm_head"] == 1
