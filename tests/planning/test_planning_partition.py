"""The balanced partition: equal to brute force, on unequal cards, tied weights together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from itertools import combinations_with_replacement
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_multigpu.errors import UsageError
from pytest_multigpu.planning import partition
from pytest_multigpu.planning.costs import costs_for
from pytest_multigpu.planning.partition import (
    Card,
    balanced,
    contiguous,
    place_groups,
    units,
)
from pytest_multigpu.planning.replay import replay
from pytest_multigpu.planning.simulate import simulate
from pytest_multigpu.records.machine import Machine
from pytest_multigpu.records.plan import Architecture, Tier


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


@pytest.mark.parametrize(("free", "gpu"), [((0, 0), None), ((1, 0), 0), ((0, 1), 1)])
def test_a_gpu_is_used_from_its_first_free_byte_on(
    free: tuple[int, int], gpu: int | None, make_llama: Callable[..., Architecture]
) -> None:
    model, machine = make_llama(layers=2), simulate("2xH100")
    gpus = tuple(replace(g, free_bytes=n) for g, n in zip(machine.gpus, free, strict=True))
    machine = replace(machine, gpus=gpus)
    if gpu is None:
        with pytest.raises(UsageError, match="sees no GPU with free memory"):
            balanced(model, machine, context_tokens=64, batch=1)
    else:
        placed = balanced(model, machine, context_tokens=64, batch=1)
        assert set(placed.values()) == {gpu}


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


def test_balanced_to_the_block(make_llama: Callable[..., Architecture]) -> None:
    model = make_llama(layers=8, hidden=2048, intermediate=8192, heads=16, kv_heads=4, vocab=64000)
    placed = balanced(model, simulate("2x8GiB"), context_tokens=2048, batch=4)
    assert [placed[f"model.layers.{i}"] for i in range(8)] == [0] * 4 + [1] * 4
    uneven = balanced(model, simulate("1x4GiB+1x12GiB"), context_tokens=2048, batch=4)
    on = [uneven[f"model.layers.{i}"] for i in range(8)]
    assert on.count(0) < on.count(1)


WIDE = {"layers": 8, "heads": 8, "hidden": 512, "intermediate": 4096, "kv_heads": 1}


@pytest.mark.parametrize(
    ("tier", "spec", "shape", "context", "batch", "layers"),
    [
        # By weights and cache alone it would be 4 each, and 3 for the smaller card.
        # Logits in fp32 are made on the first GPU: 64 sequences of 200,000 weigh some layers.
        ("16bit", "2x8GiB", {"vocab": 200_000}, 64, 64, 2),
        ("16bit", "2x8GiB", {"intermediate": 1024, "vocab": 200_000}, 64, 64, 1),
        # A prompt takes more on the first GPU, or all it has.
        ("4bit", "2x8GiB", {"hidden": 1024, "vocab": 1000}, 8000, 1, 1),
        ("16bit", "1x6GiB+1x8GiB", {"kv_heads": 8, "vocab": 64_000}, 1024, 32, 1),
        ("4bit", "1x6GiB+1x8GiB", {"hidden": 1024, "intermediate": 8192, "vocab": 1000},
         8000, 32, 0),
    ],
)  # fmt: skip
def test_what_passes_take_counts_beside_the_weights(
    tier: Tier,
    spec: str,
    shape: dict[str, int],
    context: int,
    batch: int,
    layers: int,
    make_llama: Callable[..., Architecture],
) -> None:
    model, machine = make_llama(tier, **{**WIDE, **shape}), simulate(spec)
    gpus, groups = machine.visible_gpus, units(model)

    def utilisation(count: int) -> float:
        used = replay(
            model,
            place_groups(model, groups, [count, 8 - count]),
            {i: costs_for(gpu.capability) for i, gpu in enumerate(gpus)},
            context_tokens=context,
            batch=batch,
            probe=False,
        )
        return max(use.peaks.worst_bytes / gpus[i].free_bytes for i, use in used.items())

    placed = balanced(model, machine, context_tokens=context, batch=batch)
    assert [placed[f"model.layers.{i}"] for i in range(8)].count(0) == layers
    assert min(range(9), key=utilisation) == layers


def test_what_cannot_change_is_not_replayed_again(
    make_llama: Callable[..., Architecture], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[dict[str, int | str]] = []

    def watched(
        model: Architecture, placed: dict[str, int | str], *args: Any, **kwargs: Any
    ) -> Any:
        made.append(placed)
        return replay(model, placed, *args, **kwargs)

    monkeypatch.setattr(partition, "replay", watched)
    model = make_llama(layers=8, hidden=512, intermediate=2048, heads=8, kv_heads=2, vocab=1000)
    (gpu,) = simulate("1x8GiB").gpus
    full = replace(gpu, index=1, cuda_index=1, free_bytes=0)
    for gpus in ((gpu,), (gpu, full)):
        alone = Machine(gpus=gpus, visible=tuple(range(len(gpus))))
        assert set(balanced(model, alone, context_tokens=64, batch=1).values()) == {0}
    assert made == []
    balanced(model, simulate("2x8GiB"), context_tokens=64, batch=1)
    assert 1 <= len(made) < partition.ROUNDS
    assert all(made.count(placed) == 1 for placed in made)
