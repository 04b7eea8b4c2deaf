"""A GPU's replay is made once, and comes to the same whatever is known of the others."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest

from pytest_multigpu.model import architecture
from pytest_multigpu.model.architecture import describe
from pytest_multigpu.model.config import ResolvedModel
from pytest_multigpu.planning import known as knowing
from pytest_multigpu.planning import replay as replaying
from pytest_multigpu.planning.allocator import OTHER_ORDERS, TOP_DOWN
from pytest_multigpu.planning.costs import HOPPER, OTHER, Costs
from pytest_multigpu.planning.known import Known
from pytest_multigpu.planning.load import load
from pytest_multigpu.planning.replay import Loaded, replay
from pytest_multigpu.planning.use import Use
from pytest_multigpu.records.plan import Architecture, Tier
from pytest_multigpu.units import MIB

Make = Callable[..., Architecture]
SMALL: dict[str, int] = {
    "hidden": 512, "intermediate": 2048, "heads": 8, "kv_heads": 2, "head_dim": 64, "vocab": 900,
}  # fmt: skip
GEMMA: dict[str, Any] = {
    "model_type": "gemma2", "vocab_size": 900, "hidden_size": 256, "intermediate_size": 640,
    "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "max_position_embeddings": 4096, "sliding_window": 256, "pad_token_id": 0,
}  # fmt: skip
"""Its layers are of two kinds, in turn."""


def split(model: Architecture, *counts: int) -> dict[str, int | str]:
    """That many layers on each GPU; embeddings on the first, norm and head on the last."""
    gpus = [gpu for gpu, count in enumerate(counts) for _ in range(count)]
    first, last = 0, len(counts) - 1
    return {
        block.name: gpus[block.layer]
        if block.layer is not None
        else (first if block.kind == "embedding" else last)
        for block in model.blocks
    }


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Layers on each GPU that was replayed."""
    found: list[int] = []

    def watched(gpu: Any, model: Architecture, blocks: list[Any], weights: Any) -> None:
        found.append(sum(block.kind == "layer" for block in blocks))
        load(gpu, model, blocks, weights)

    monkeypatch.setattr(replaying, "load", watched)
    return found


def test_gpus_that_do_the_same_are_replayed_once(make_llama: Make, loads: list[int]) -> None:
    model = make_llama(layers=15, **SMALL)
    known, costs = Known(model), dict.fromkeys(range(5), HOPPER)

    def used(*counts: int) -> dict[int, Use]:
        loads.clear()
        placed = split(model, *counts)
        return replay(model, placed, costs, context_tokens=500, batch=2, known=known)

    found = used(3, 3, 3, 3, 3)
    assert loads == [3, 3, 3, 3]  # but one of those between, alike and without the probe's layer
    assert found[2] == found[3]
    used(3, 3, 3, 3, 3)
    assert loads == []
    used(3, 3, 4, 2, 3)
    assert sorted(loads) == [2, 4]
    used(3, 3, 2, 4, 3)
    assert loads == []


def test_what_tells_gpus_apart(make_llama: Make, loads: list[int]) -> None:
    """Costs, limits, what is asked for, and where the weights lie."""
    model = make_llama(layers=12, **SMALL)
    placed = split(model, 3, 3, 3, 3)
    known, costs = Known(model), dict.fromkeys(range(4), HOPPER)

    def run(made: dict[str, int | str], costs: Mapping[int, Costs], **more: Any) -> list[int]:
        loads.clear()
        sizes = {"context_tokens": 300, "batch": 2, **more}
        Loaded(model, made, costs, known=known).run(**sizes)
        return sorted(loads)

    # A probe reads after layer 3 of 12 by default, the last one of the first GPU.
    assert run(placed, costs) == [3, 3, 3]
    assert run(placed, costs) == []
    assert run(placed, {**costs, 2: OTHER}) == [3]
    assert run(placed, costs, limits={0: 2**40, 1: 2**40, 2: 2**41, 3: 2**40}) == [3, 3, 3, 3]
    assert run(placed, costs, batch=3) == [3, 3, 3]
    assert run(placed, costs, context_tokens=301) == [3, 3, 3]
    assert run(placed, costs, new_tokens=5) == [3, 3, 3]
    assert run(placed, {i: replace(HOPPER, int8_outliers=0.01) for i in costs}) == [3, 3, 3]
    # Runs on the first GPU all the same, and leaves the second one layer less.
    assert run({**placed, "model.layers.4": "cpu"}, costs) == [2, 3]


def test_outliers_count_where_a_gpu_has_such_layers(make_llama: Make, loads: list[int]) -> None:
    model = make_llama("8bit", layers=12, **SMALL)
    placed, known = split(model, 3, 3, 3, 3), Known(model)

    def layers_replayed(costs: Costs) -> int:
        loads.clear()
        every = dict.fromkeys(range(4), costs)
        replay(model, placed, every, context_tokens=300, batch=2, known=known)
        return len(loads)

    assert layers_replayed(HOPPER) == 3
    assert layers_replayed(HOPPER.as_trained(9)) == 1
    assert layers_replayed(HOPPER.as_trained(8)) == 1
    assert layers_replayed(HOPPER.as_trained(3)) == 1  # both GPUs between have them throughout
    assert layers_replayed(HOPPER.as_trained(0)) == 1


@pytest.mark.parametrize("tier", ["16bit", "8bit", "4bit"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_split_comes_to_the_same_whatever_is_known(
    family: str, tier: Tier, make_llama: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Placed at random, layer by layer, beside a replay of every GPU by itself at once."""
    if family == "llama":  # of one kind, but every third has a window
        model = make_llama(tier, layers=6, **SMALL)
        blocks = [
            replace(b, kv_window=64 if (b.layer or 1) % 3 == 0 else None) for b in model.blocks
        ]
        # Two tables that are alike, of which the first GPU holds the first.
        blocks.insert(1, replace(blocks[0], name="model.positions"))
        model = replace(model, blocks=tuple(blocks))
    else:  # of two kinds, and otherwise alike
        monkeypatch.setattr(architecture, "AS_LLAMA", ())
        resolved = ResolvedModel(name=family, config_dict=GEMMA)
        model = describe(resolved, tier=tier, use_cache=False)
        model = replace(model, blocks=tuple(replace(b, kv_window=None) for b in model.blocks))
    rng, known = random.Random(f"{family} {tier}"), Known(model)
    prices = [
        HOPPER,
        replace(OTHER, expandable_segments=True),
        replace(HOPPER, int8_outliers=0.01, int8_outliers_from=2),
    ]
    short: dict[str, Any] = {"limits": dict.fromkeys(range(3), 800 * MIB), "enough_if_short": True}
    for _ in range(150):
        costs = dict.fromkeys(range(3), rng.choice(prices))
        # In two runs, or anyhow.
        cuts = sorted(rng.choices(range(len(model.blocks)), k=4))
        runs = [sum(cut <= i for cut in cuts) % 3 for i in range(len(model.blocks))]
        where: list[int | str] = [0, 1, 2, "cpu"]
        anyhow = rng.random() < 0.3
        placed = {
            block.name: rng.choice(where) if anyhow else run
            for block, run in zip(model.blocks, runs, strict=True)
        }
        how: dict[str, Any] = {
            "weights": rng.choice(["synthetic", "checkpoint"]),
            "top_down": rng.choice([TOP_DOWN, OTHER_ORDERS[1]]),
        }
        asked = {"context_tokens": 700, "batch": 3, **rng.choice([{}, short])}
        found = Loaded(model, placed, costs, known=known, **how).run(**asked)
        with monkeypatch.context() as patch:
            patch.setattr(knowing, "marks", lambda made: list(range(len(made.blocks))))
            alone = Loaded(model, placed, costs, **how).run(**asked)
        assert found == alone
