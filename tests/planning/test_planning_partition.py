"""The balanced partition: equal to brute force, on unequal cards, tied weights together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction
from itertools import combinations_with_replacement

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_multigpu.errors import UsageError
from pytest_multigpu.planning.partition import (
    Card,
    balanced,
    contiguous,
    max_memory_for_auto,
    units,
)
from pytest_multigpu.planning.simulate import simulate
from pytest_multigpu.records.machine import Machine
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
    with pytest.raises(ValueError, match="nothing to place, or nowhere to place it"):
        contiguous(sizes, [Card(free_bytes=0)] if sizes else [Card(free_bytes=1)])


def test_nf4_on_four_equal_cards_differs_by_a_layer_plus_the_head(
    make_llama: Callable[..., Architecture],
) -> None:
    model = make_llama("4bit")
    placed = balanced(model, simulate("4xH100"), context_tokens=2048, batch=1)
    assert list(placed) == [block.name for block in model.blocks]
    assert placed["model.embed_tokens"] == 0
    assert placed["model.norm"] == placed["lm_head"] == 3
    assert list(placed.values()) == sorted(placed.values())
    on = [
        sum(block.weights_bytes for block in model.blocks if placed[block.name] == i)
        for i in range(4)
    ]
    layer, head = model.blocks[1].weights_bytes, model.blocks[-1].weights_bytes
    assert max(on) - min(on) <= layer + head


def test_a_smaller_card_gets_fewer_layers(make_llama: Callable[..., Architecture]) -> None:
    placed = balanced(make_llama(), simulate("3xH100+1x48GiB"), context_tokens=2048, batch=1)
    counts = [list(placed.values()).count(i) for i in range(4)]
    assert counts[3] < min(counts[:3])


def test_tied_weights_stay_with_their_owner(make_llama: Callable[..., Architecture]) -> None:
    model = make_llama("16bit", layers=4)
    head = replace(model.blocks[-1], weights_bytes=0, tied_to="model.embed_tokens")
    model = replace(model, blocks=(*model.blocks[:-1], head))
    placed = balanced(model, simulate("2xH100"), context_tokens=64, batch=1)
    assert placed["lm_head"] == placed["model.embed_tokens"] == 0
    assert [block.name for group in units(model) for block in group][-1] == "lm_head"


def test_no_gpu_with_free_memory(make_llama: Callable[..., Architecture]) -> None:
    with pytest.raises(UsageError) as error:
        balanced(make_llama(layers=1), Machine(), context_tokens=1, batch=1)
    assert str(error.value) == (
        "--gpu-placement=balanced: CUDA sees no GPU with free memory; free one, or use "
        "--gpu-tier=cpu"
    )


def greedy(model: Architecture) -> Callable[[Mapping[int | str, int]], dict[str, int | str]]:
    """A planner like transformers': fills GPU after GPU, keeping one layer's room on each."""

    def plan(max_memory: Mapping[int | str, int]) -> dict[str, int | str]:
        placed: dict[str, int | str] = {}
        gpus = sorted(key for key in max_memory if isinstance(key, int))
        left = {i: max_memory[i] - model.blocks[1].weights_bytes for i in gpus}
        at = 0
        for block in model.blocks:
            while at < len(gpus) and left[gpus[at]] < block.weights_bytes:
                at += 1
            placed[block.name] = gpus[at] if at < len(gpus) else "cpu"
            if at < len(gpus):
                left[gpus[at]] -= block.weights_bytes
        return placed

    return plan


def test_max_memory_that_makes_auto_come_out_balanced(
    make_llama: Callable[..., Architecture],
) -> None:
    model, machine = make_llama("4bit"), simulate("4xH100")
    target = balanced(model, machine, context_tokens=2048, batch=1)
    caps = max_memory_for_auto(model, target, machine, greedy(model))
    assert caps is not None
    found = greedy(model)({**caps, "cpu": 0})
    assert {name: found[name] for name in target if "layers" in name} == {
        name: place for name, place in target.items() if "layers" in name
    }


def test_no_max_memory_where_the_planner_never_agrees(
    make_llama: Callable[..., Architecture],
) -> None:
    model, machine = make_llama("4bit", layers=8), simulate("2xH100")
    target = balanced(model, machine, context_tokens=64, batch=1)
    assert max_memory_for_auto(model, target, machine, lambda _: {"": 0}) is None
