"""Each phase's peak in parts, on the hand-made Llama."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pytest_multigpu.planning.allocator import Allocator
from pytest_multigpu.planning.costs import HOPPER
from pytest_multigpu.planning.forward import Forward, Gpu
from pytest_multigpu.planning.load import TABLE_VALUES, load
from pytest_multigpu.planning.peaks import predict
from pytest_multigpu.planning.replay import NEW_TOKENS, replay
from pytest_multigpu.planning.simulate import simulate
from pytest_multigpu.planning.use import Use
from pytest_multigpu.records.plan import Architecture, DevicePlan, Tier
from pytest_multigpu.units import MIB

Make = Callable[..., Architecture]
PHASES = ["load", "prefill", "decode", "probe"]
WEIGHT = 28672 * 8192 * 2


def used(model: Architecture, *, context: int = 2048, batch: int = 1, probe: bool = True) -> Use:
    placed = dict.fromkeys((block.name for block in model.blocks), 0)
    return replay(model, placed, {0: HOPPER}, context_tokens=context, batch=batch, probe=probe)[0]


def device(model: Architecture, context: int = 2048, batch: int = 1) -> DevicePlan:
    return predict(
        model, {"": 0}, simulate("1xH200"), context_tokens=context, batch=batch,
        weights="synthetic", placement="p",
    ).devices[0]  # fmt: skip


@pytest.mark.parametrize("tier", ["16bit", "8bit", "4bit"])
@pytest.mark.parametrize(("context", "batch"), [(1, 1), (17, 1), (2048, 1), (512, 4)])
def test_parts_sum_to_the_phases_peak(
    tier: Tier, context: int, batch: int, make_llama: Make
) -> None:
    model = make_llama(tier, layers=4)
    found = device(model, context, batch)
    assert list(found.parts) == PHASES
    for phase, parts in found.parts.items():
        assert parts.total_bytes == getattr(found.peaks, f"{phase}_bytes"), phase
        assert parts.weights_bytes == found.weights_bytes
        assert min(vars(parts).values()) >= 0, phase


@pytest.mark.parametrize("tier", ["16bit", "4bit"])
def test_a_peak_is_what_the_allocator_reserved_and_what_is_outside_it(
    tier: Tier, make_llama: Make
) -> None:
    model = make_llama(tier, layers=2)
    found = used(model)
    gpu = Gpu(allocator=Allocator(), costs=HOPPER)
    load(gpu, model, model.blocks)
    assert found.parts["load"].total_bytes == gpu.allocator.peak_reserved + HOPPER.context_bytes
    gpu.allocator.restart_peaks()
    gpu.allocator.take(HOPPER.workspace_bytes)
    blocks = [(block, gpu) for block in model.blocks]
    Forward(model, logits_rows=1).run(blocks, tokens=2032, batch=1, total_tokens=2032)
    outside = HOPPER.context_bytes + HOPPER.module_bytes
    assert found.parts["prefill"].total_bytes == gpu.allocator.peak_reserved + outside


def test_a_prompts_worst_moment_is_a_layers(make_llama: Make) -> None:
    layers, tokens = 4, 2048 - NEW_TOKENS
    prefill, decode, probe = (used(make_llama(layers=layers)).parts[p] for p in PHASES[1:])
    # Its input (not the embeddings), residual and normed; three of the intermediate size; angles.
    at_once = tokens * 2 * (4 * 8192 + 3 * 28672 + 2 * 128)
    # Each block may be a MiB larger than what is in it.
    assert 0 <= prefill.activations_bytes - at_once < 9 * MIB
    assert prefill.kv_bytes == layers * tokens * 4096
    assert prefill.logits_bytes == 0
    assert prefill.context_bytes == HOPPER.context_bytes + HOPPER.module_bytes
    assert prefill.workspace_bytes == 32 * MIB
    assert prefill.transient_bytes == 0
    # One token: the most is while the last layer's K is joined, the old one beside it.
    assert decode.kv_bytes == layers * (tokens + 1) * 4096 + tokens * 2048
    assert decode.logits_bytes == 0
    assert decode.activations_bytes < MIB
    assert decode.slack_bytes > prefill.slack_bytes
    # No cache, no logits, and a layer's output kept.
    assert probe.kv_bytes == probe.logits_bytes == 0
    assert 0 <= probe.activations_bytes - at_once - tokens * 8192 * 2 < 10 * MIB


@pytest.mark.parametrize(("tier", "buffers"), [("16bit", 0), ("8bit", 2), ("4bit", 1)])
def test_loading_has_weights_and_what_is_there_for_a_while(
    tier: Tier, buffers: int, make_llama: Make
) -> None:
    model = make_llama(tier, layers=3)
    load = used(model).parts["load"]
    assert load.transient_bytes == TABLE_VALUES * 2 + buffers * WEIGHT
    assert load.weights_bytes == model.weights_bytes
    assert load.context_bytes == HOPPER.context_bytes
    assert load.kv_bytes == load.activations_bytes == load.workspace_bytes == 0
    assert 0 <= load.slack_bytes < 8 * MIB


def test_without_a_probe_there_is_no_probes_part(make_llama: Make) -> None:
    found = used(make_llama(layers=1), probe=False)
    assert list(found.parts) == PHASES[:3]
    assert found.peaks.probe_bytes == 0


def test_activations_are_those_of_the_phase_that_has_most(make_llama: Make) -> None:
    """A probe keeps a layer's output, which a prompt with a cache does not."""
    found = used(make_llama(layers=4))
    probe, prefill = (found.parts[phase].activations_bytes for phase in ("probe", "prefill"))
    assert found.activation_bytes == probe > prefill
    planned = device(make_llama(layers=4))
    assert planned.activation_bytes == probe
    parts = planned.weights_bytes + planned.kv_bytes + planned.activation_bytes
    assert planned.reserve_bytes == planned.peak_bytes - parts
    wide = used(make_llama(layers=1, hidden=64, intermediate=64, heads=1, kv_heads=1), context=2)
    assert wide.activation_bytes == max(
        parts.activations_bytes + parts.logits_bytes for parts in wide.parts.values()
    )
    assert wide.parts["decode"].logits_bytes == 128256 * 6


def test_logits_on_the_first_gpu_are_counted_there(make_llama: Make) -> None:
    model = make_llama(layers=2)
    placed = {block.name: int(block.kind in ("norm", "head")) for block in model.blocks}
    first, second = replay(
        model, placed, {0: HOPPER, 1: HOPPER}, context_tokens=2, batch=1
    ).values()
    # Moved in the model's dtype, and once more in fp32.
    assert first.parts["decode"].logits_bytes == 128256 * (2 + 4)
    assert second.parts["decode"].logits_bytes == 128256 * 2
