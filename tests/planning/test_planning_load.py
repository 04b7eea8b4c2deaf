"""Loading: what a block's tensors are, and what the allocator is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from pytest_multigpu.model import reader, synthetic
from pytest_multigpu.planning.allocator import Allocator
from pytest_multigpu.planning.costs import HOPPER
from pytest_multigpu.planning.forward import Gpu
from pytest_multigpu.planning.load import (
    SLOTS,
    TABLE_VALUES,
    load,
    scratch_sizes,
    tensor_sizes,
)
from pytest_multigpu.records.plan import Architecture, Block, Tier
from pytest_multigpu.units import MIB

Make = Callable[..., Architecture]
SHAPE = {"layers": 1, "hidden": 512, "intermediate": 2048, "heads": 4, "kv_heads": 1, "vocab": 4096}
WIDE, KV, SQUARE = 512 * 2048, 512 * 128, 512 * 512
LINEARS = [WIDE] * 3 + [KV, SQUARE, SQUARE, KV]


def test_a_layer_tensor_by_tensor(make_llama: Make) -> None:
    layer = make_llama(**SHAPE).blocks[1]
    norms = 2 * 512 * 2
    assert tensor_sizes(make_llama(**SHAPE), layer) == [2 * n for n in LINEARS] + [norms]


def test_a_quantised_layer_tensor_by_tensor(make_llama: Make) -> None:
    model = make_llama("4bit", **SHAPE)
    halves = [part for n in LINEARS for part in (n // 2, n // 16)]
    # The tables of 16 fp32 values and the norms.
    assert tensor_sizes(model, model.blocks[1]) == [*halves, 7 * 64 + 2 * 512 * 2]
    model = make_llama("8bit", **SHAPE)
    scales = 4 * (512 + 128 + 128 + 512 + 2048 + 2048 + 512)
    assert tensor_sizes(model, model.blocks[1]) == [*LINEARS, scales + 2 * 512 * 2]


def test_a_layer_of_another_shape_is_cut_like_its_largest_linear(make_llama: Make) -> None:
    model = make_llama("8bit", **SHAPE)
    experts = Block(
        name="model.layers.0",
        kind="layer",
        layer=0,
        parameters=WIDE * 100 + 7,
        weights_bytes=WIDE * 100 + 99,
        load_transient_bytes=WIDE * 2,
        quantised_parameters=WIDE * 100,
    )
    assert tensor_sizes(model, experts) == [WIDE] * 100 + [99]
    assert tensor_sizes(model, replace(experts, load_transient_bytes=0)) == [WIDE * 100 + 99]
    # Experts in one tensor stay in 16 bit: what is quantised is cut, they are one piece.
    half = replace(experts, quantised_parameters=WIDE * 50, weights_bytes=WIDE * 50 + 2 * WIDE * 50)
    assert tensor_sizes(model, half) == [WIDE] * 50 + [2 * WIDE * 50]
    # Smaller Linears are left together.
    mixed = replace(experts, quantised_parameters=WIDE * 99 + WIDE - 1)
    assert tensor_sizes(model, mixed) == [WIDE] * 99 + [WIDE + 99]
    # Smaller than its parameters suggest: one piece.
    assert tensor_sizes(model, replace(experts, weights_bytes=WIDE)) == [WIDE]
    assert tensor_sizes(model, replace(experts, weights_bytes=WIDE * 100)) == [WIDE] * 100


@pytest.mark.parametrize(("extra", "tensors"), [(0, 7), (16 * 3072, 8), (16 * 3072 + 1, 1)])
def test_norms_and_biases_are_told_from_more_linears(
    extra: int, tensors: int, make_llama: Make
) -> None:
    model = make_llama(**SHAPE)
    block = replace(
        model.blocks[1],
        parameters=sum(LINEARS) + extra,
        weights_bytes=2 * (sum(LINEARS) + extra),
    )
    sizes = tensor_sizes(model, block)
    assert len(sizes) == tensors
    assert sum(sizes) == block.weights_bytes


def test_nothing_and_tables(make_llama: Make) -> None:
    model = make_llama(**SHAPE)
    assert tensor_sizes(model, replace(model.blocks[0], weights_bytes=0)) == []
    assert tensor_sizes(model, model.blocks[0]) == [4096 * 512 * 2]


@pytest.mark.parametrize(
    ("tier", "dtype", "buffers"),
    [("4bit", "bfloat16", 1), ("8bit", "bfloat16", 2), ("8bit", "float16", 1)],
)
def test_scratch_beside_the_weights(tier: Tier, dtype: str, buffers: int, make_llama: Make) -> None:
    model = replace(make_llama(tier, **{**SHAPE, "layers": 4}), dtype=dtype)
    gpu = Gpu(allocator=Allocator(), costs=HOPPER)
    load(gpu, model, model.blocks)
    # A scratch buffer of 2 MiB comes from a segment of 20 MiB, two of them from the same.
    large = sum(size for b in model.blocks for size in tensor_sizes(model, b) if size > MIB)
    reserve = -(-large // (2 * MIB)) * 2 * MIB
    assert gpu.allocator.allocated == sum(
        -(-size // 512) * 512 for b in model.blocks for size in tensor_sizes(model, b)
    )
    assert gpu.allocator.peak_reserved >= reserve
    largest = model.blocks[1].load_transient_bytes
    wide = replace(
        model, blocks=tuple(replace(b, load_transient_bytes=64 * MIB) for b in model.blocks)
    )
    held = Gpu(allocator=Allocator(), costs=HOPPER)
    load(held, wide, wide.blocks)
    assert largest == 2 * MIB
    assert held.allocator.peak_reserved == held.allocator.reserved + buffers * 64 * MIB


def test_the_table_is_as_large_as_the_loader_makes_it(make_llama: Make) -> None:
    assert TABLE_VALUES == synthetic.PERIOD
    assert SLOTS == reader.SLOTS
    layer = make_llama(**SHAPE).blocks[1]
    for parameters, table in ((2 * TABLE_VALUES, []), (2 * TABLE_VALUES + 1, [4 * TABLE_VALUES])):
        blocks = [replace(layer, parameters=parameters)]
        model = replace(make_llama(**SHAPE), dtype="float32")
        assert scratch_sizes(model, blocks, "synthetic") == table
        assert scratch_sizes(model, blocks, "checkpoint") == []
        assert scratch_sizes(replace(model, tier="cpu"), blocks, "synthetic") == []


def test_float16_for_int8_is_half_of_float32(make_llama: Make) -> None:
    model = replace(make_llama("8bit", **SHAPE), dtype="float32")
    blocks = [replace(block, load_transient_bytes=4 * WIDE) for block in model.blocks]
    assert scratch_sizes(model, blocks, "synthetic") == [4 * WIDE, 2 * WIDE]
    assert scratch_sizes(model, blocks, "checkpoint") == [4 * WIDE, 4 * WIDE, 2 * WIDE]


def test_one_piece_for_all_that_is_above_a_mib(make_llama: Make) -> None:
    model = make_llama(**{**SHAPE, "layers": 3})
    gpu = Gpu(allocator=Allocator(), costs=HOPPER)
    load(gpu, model, model.blocks)
    sizes = [size for block in model.blocks for size in tensor_sizes(model, block)]
    large = sum(size for size in sizes if size > MIB)
    small = sum(-(-size // 512) * 512 for size in sizes if size <= MIB)
    assert gpu.allocator.reserved == (
        -(-large // (2 * MIB)) * 2 * MIB + -(-small // (2 * MIB)) * 2 * MIB
    )
    assert gpu.allocator.peak_reserved == gpu.allocator.reserved
    nothing = Gpu(allocator=Allocator(), costs=HOPPER)
    load(nothing, model, [])
    assert nothing.allocator.peak_reserved == 0
