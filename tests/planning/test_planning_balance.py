"""The balanced placement: no partition is predicted to leave its fullest GPU less full."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations_with_replacement, pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pytest_multigpu.errors import UsageError
from pytest_multigpu.planning import balance
from pytest_multigpu.planning.balance import balanced, balanced_plan, fitting_plan
from pytest_multigpu.planning.costs import costs_for
from pytest_multigpu.planning.partition import place_groups, units
from pytest_multigpu.planning.peaks import Predictor
from pytest_multigpu.planning.replay import replay
from pytest_multigpu.planning.simulate import simulate
from pytest_multigpu.records.machine import Machine
from pytest_multigpu.records.plan import Architecture, DeviceMap, Plan, Tier
from pytest_multigpu.units import GIB


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


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[DeviceMap]:
    """The placements that were replayed."""
    found: list[DeviceMap] = []

    def watched(
        model: Architecture, placed: DeviceMap, machine: Machine, **others: Any
    ) -> Predictor:
        found.append(placed)
        return Predictor(model, placed, machine, **others)

    monkeypatch.setattr(balance, "Predictor", watched)
    return found


def test_what_cannot_change_is_not_replayed_again(
    make_llama: Callable[..., Architecture], made: list[DeviceMap]
) -> None:
    model = make_llama(layers=8, hidden=512, intermediate=2048, heads=8, kv_heads=2, vocab=1000)
    (gpu,) = simulate("1x8GiB").gpus
    full = replace(gpu, index=1, cuda_index=1, free_bytes=0)
    for gpus in ((gpu,), (gpu, full)):
        alone = Machine(gpus=gpus, visible=tuple(range(len(gpus))))
        assert set(balanced(model, alone, context_tokens=64, batch=1).values()) == {0}
    assert len(made) == 2
    made.clear()
    balanced(model, simulate("2x8GiB"), context_tokens=64, batch=1)
    assert 1 <= len(made) < balance.ROUNDS
    assert all(made.count(placed) == 1 for placed in made)


def test_a_fit_is_looked_for_while_there_may_be_one(
    make_llama: Callable[..., Architecture], made: list[DeviceMap]
) -> None:
    """3, 3 and 2 layers by their bytes; 1, 4 and 3 take 2.5% less, and nothing much less."""
    model = make_llama(heads=8, **shaped(8, 2048, 1024, 8, 1000))
    roomy = simulate("3x80GiB")

    def layers(plan: Plan | None) -> list[int]:
        assert plan is not None
        on = [plan.device_map[f"model.layers.{i}"] for i in range(8)]
        return [on.count(i) for i in range(3)]

    best = balanced_plan(model, roomy, 8000, 4)
    assert best is not None
    assert layers(best) == [1, 4, 3]
    peak = max(device.peak_bytes for device in best.devices)

    def looked(free: int) -> tuple[Plan | None, int]:
        made.clear()
        gpus = tuple(replace(gpu, free_bytes=free) for gpu in roomy.gpus)
        return fitting_plan(model, replace(roomy, gpus=gpus), 8000, 4), len(made)

    first, replays = looked(80 * GIB)
    assert (layers(first), replays) == ([3, 3, 2], 1)
    moved, replays = looked(peak)
    assert layers(moved) != [3, 3, 2]
    assert replays > 1
    near, replays = looked(peak * 97 // 100)
    assert near is None
    assert replays > balance.ROUNDS


Shape = dict[str, int]


def fullest(plan: Plan) -> float:
    return max(device.peak_bytes / device.limit_bytes for device in plan.devices)


def shaped(layers: int, hidden: int, intermediate: int, kv_heads: int, vocab: int) -> Shape:
    return {
        "layers": layers,
        "hidden": hidden,
        "intermediate": intermediate,
        "kv_heads": kv_heads,
        "vocab": vocab,
    }


def case(tier: Tier, shape: Shape, sizes: list[int], context: int, batch: int) -> example:
    return example(tier=tier, shape=shape, sizes=sizes, context=context, batch=batch, grows=False)


@given(
    tier=st.sampled_from(["16bit", "8bit", "4bit"]),
    shape=st.fixed_dictionaries(
        {
            "layers": st.integers(3, 6),
            "hidden": st.sampled_from([512, 2048]),
            "intermediate": st.sampled_from([1024, 8192]),
            "kv_heads": st.sampled_from([1, 8]),
            "vocab": st.sampled_from([1000, 200_000]),
        }
    ),
    sizes=st.lists(st.sampled_from([2, 3, 4, 8]), min_size=2, max_size=3),
    context=st.sampled_from([64, 2048, 16_000]),
    batch=st.sampled_from([1, 16]),
    grows=st.booleans(),
)
# What the exact partition for the sizes gives is not the best one here; in the second it does not
# even fit.
@case("4bit", shaped(6, 2048, 1024, 8, 1000), [3, 3], 2048, 16)
@case("4bit", shaped(5, 2048, 8192, 8, 200_000), [4, 4], 2048, 16)
@case("4bit", shaped(7, 2048, 8192, 8, 1000), [4, 4], 16_000, 1)
@case("4bit", shaped(5, 2048, 8192, 8, 200_000), [4, 8, 8, 4], 2048, 16)
@case("8bit", shaped(8, 2048, 1024, 1, 1000), [2, 8, 8], 2048, 16)
# Two layers more on a GPU take less than one does, or no more.
@case("4bit", shaped(5, 512, 8192, 1, 1000), [2, 8, 8], 16_000, 16)
@case("4bit", shaped(5, 512, 1024, 1, 200_000), [2, 8, 8], 16_000, 16)
@case("4bit", shaped(5, 512, 8192, 8, 1000), [2, 2], 2048, 16)
@case("4bit", shaped(5, 512, 8192, 1, 1000), [3, 2, 3], 2048, 16)
# A second layer on the first GPU takes less than one does.
@case("8bit", shaped(3, 2048, 1024, 1, 200_000), [3, 4], 2048, 1)
@case("16bit", shaped(8, 2048, 8192, 8, 1000), [2, 2, 2], 2048, 16)
@case("16bit", shaped(7, 2048, 1024, 1, 200_000), [4, 2, 4], 16_000, 16)
@settings(max_examples=15, deadline=None)
def test_no_partition_is_better(
    tier: Tier,
    shape: Shape,
    sizes: list[int],
    context: int,
    batch: int,
    grows: bool,
    make_llama: Callable[..., Architecture],
) -> None:
    """Of all there are, by the very plans that are shown."""
    model = make_llama(tier, heads=8, **shape)
    cards = "+".join(f"1x{size}GiB" for size in sizes)
    machine = replace(simulate(cards), expandable_segments=grows)

    def planned(placed: DeviceMap) -> Plan:
        made = Predictor(model, placed, machine)
        return made.plan(context_tokens=context, batch=batch, placement="balanced")

    plans = []
    for inner in combinations_with_replacement(range(model.layers + 1), len(sizes) - 1):
        ends = (0, *inner, model.layers)
        counts = [end - start for start, end in pairwise(ends)]
        plans.append(planned(place_groups(model, units(model), counts)))
    found = planned(balanced(model, machine, context_tokens=context, batch=batch))
    assert fullest(found) == min(map(fullest, plans))
    assert found.fits == any(plan.fits for plan in plans)
    enough = fitting_plan(model, machine, context, batch)
    assert (enough is not None) == found.fits
    if enough is not None:
        assert enough.fits
        assert fullest(enough) >= fullest(found)


def test_a_gpu_without_memory_is_no_way_out(make_llama: Callable[..., Architecture]) -> None:
    model = make_llama("4bit", heads=8, **shaped(6, 2048, 1024, 8, 1000))
    two = simulate("2x3GiB")
    first, last = two.gpus
    full = replace(first, index=1, cuda_index=1, free_bytes=0)
    three = Machine(gpus=(first, full, replace(last, index=2, cuda_index=2)), visible=(0, 1, 2))
    beside = balanced(model, two, context_tokens=2048, batch=16)
    placed = balanced(model, three, context_tokens=2048, batch=16)
    assert placed == {name: 2 if gpu else 0 for name, gpu in beside.items()}
    # 3 and 3 by the sizes alone.
    assert [placed[f"model.layers.{i}"] for i in range(6)] == [0, 0, 2, 2, 2, 2]


def test_the_plan_says_how_it_was_placed(make_llama: Callable[..., Architecture]) -> None:
    model, machine = make_llama(**WIDE), simulate("2x8GiB")
    plan = balanced_plan(model, machine, 64, 2, weights="checkpoint")
    assert plan is not None
    assert (plan.placement, plan.weights) == ("balanced", "checkpoint")
    assert (plan.context_tokens, plan.batch) == (64, 2)
    assert plan.device_map == balanced(model, machine, context_tokens=64, batch=2)
    assert balanced_plan(model, Machine(), 64, 2) is None


@pytest.mark.parametrize(
    ("spec", "context", "batch"),
    [("4xH200", 68_968, 4), ("4xH200", 37_187, 8), ("4xH100", 21_833, 8), ("2xH100", 20_314, 6)],
)
def test_what_autos_split_holds_fits(
    spec: str, context: int, batch: int, make_llama: Callable[..., Architecture]
) -> None:
    """The longest contexts of an nf4 70B under auto, where one more layer on a GPU keeps a freed
    segment from being used again: the exact partition for the sizes alone did not fit."""
    model, machine = make_llama("4bit"), simulate(spec)
    counts = [15, 25, 25, 15] if spec.startswith("4") else [37, 43]
    for placed in (
        place_groups(model, units(model), counts),
        balanced(model, machine, context_tokens=context, batch=batch),
    ):
        made = Predictor(model, placed, machine)
        assert made.fit(context_tokens=context, batch=batch).fits
