"""How long a decode step should take, and what it reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from pytest_multigpu.planning.speed import launched, step_bytes, step_seconds
from pytest_multigpu.records.passes import LayerPass, Pass, Passes, Size, Step
from pytest_multigpu.records.plan import Architecture, Block

Make = Callable[..., Architecture]


def decode(*layers: LayerPass) -> Pass:
    return Pass(
        phase="decode", batched=False, beyond=False, before=(), hidden=1, hidden_is_kept=False,
        layers=layers, norm=(), head=(), logits=Size(),
    )  # fmt: skip


def layer(kernels: int, linears: int) -> LayerPass:
    steps = (Step("take"), *(Step("linear", i) for i in range(linears)))
    return LayerPass(steps=steps, output=0, kernels=kernels)


def test_the_slower_of_memory_and_python_sets_the_pace(make_llama: Make) -> None:
    model = make_llama()  # 80 layers of 40 kernels

    def step(memory_seconds: float, gpus: int = 1, launch: float = 7.5e-6) -> float:
        return step_seconds(model, memory_seconds, gpus=gpus, launch_seconds=launch)

    python = 3.3e-3 + 80 * 40 * 25e-6
    assert step(0.0) == step(0.06) == pytest.approx(python)
    assert step(0.08) == pytest.approx(0.1)
    assert step(0.0, gpus=2) == step(0.0, gpus=8) == pytest.approx(1.3 * python)
    assert step(0.0, launch=15e-6) == pytest.approx(2 * python)
    assert step_seconds(model, 0.0, gpus=1) == step(0.0)


def test_quantised_linears_take_longer(make_llama: Make) -> None:
    plain, cpu, int8, nf4 = (
        step_seconds(make_llama(tier), 0.0, gpus=1) for tier in ("16bit", "cpu", "8bit", "4bit")
    )
    assert cpu == plain
    assert int8 - plain == pytest.approx(80 * 7 * 460e-6)
    assert nf4 - plain == pytest.approx(80 * 7 * 11e-6)


def test_what_was_recorded_of_each_kind_of_layer_is_counted(make_llama: Make) -> None:
    model = make_llama(layers=3)
    assert launched(model) == (120, 21)
    one, other = layer(10, 2), layer(100, 0)
    passes = Passes(kinds=(0, 1, 0), window=None, recorded=(decode(one, other),))
    assert launched(replace(model, passes=passes)) == (120, 4)
    fewer = replace(model, passes=replace(passes, kinds=(0, 0, 0)))
    assert launched(fewer) == (30, 6)
    assert step_seconds(fewer, 0.0, gpus=1) == pytest.approx(3.3e-3 + 30 * 25e-6)


def test_a_step_reads_all_but_the_table_of_embeddings(make_llama: Make) -> None:
    model = make_llama(layers=2)
    found = step_bytes(model)
    embedding, *others = model.blocks
    assert found == {embedding.name: 0} | {b.name: b.weights_bytes for b in others}
    cached = step_bytes(model, context_tokens=100, batch=3)
    for block in others:
        assert cached[block.name] - found[block.name] == 300 * block.kv_bytes_per_token
    # Nothing is routed: nothing is gathered.
    assert step_bytes(model, copies=True) == found
    tied = replace(model.blocks[-1], weights_bytes=0, tied_to=embedding.name)
    shared = step_bytes(replace(model, blocks=(*model.blocks[:-1], tied)))
    assert shared[embedding.name] == embedding.weights_bytes
    assert shared[tied.name] == 0


def test_of_routed_experts_it_reads_those_that_the_tokens_go_through(make_llama: Make) -> None:
    model = make_llama(layers=1)
    experts = Block(
        name="model.layers.0", kind="layer", layer=0, weights_bytes=1000, routed_bytes=800,
        routed_share=0.25,
    )  # fmt: skip

    def read(block: Block, batch: int, *, copies: bool = False) -> int:
        blocks = tuple(block if b.kind == "layer" else b for b in model.blocks)
        routed = replace(model, blocks=blocks)
        if batch == 1 and not copies:
            assert step_bytes(routed) == step_bytes(routed, batch=1)
        return step_bytes(routed, batch=batch, copies=copies)[block.name]

    assert [read(experts, batch) for batch in (1, 3, 4, 5)] == [400, 800, 1000, 1000]
    # A copy of each token's own is written and read, though all were read already.
    assert [read(experts, batch, copies=True) for batch in (1, 4, 5)] == [800, 2600, 3000]
    unknown = replace(experts, routed_share=1.0)
    assert [read(unknown, 1, copies=copies) for copies in (False, True)] == [1000, 1000]
