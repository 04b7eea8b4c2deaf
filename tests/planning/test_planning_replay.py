"""A session replayed: each phase held against bytes counted by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from pytest_multigpu.model import peaks as measured
from pytest_multigpu.planning.costs import Costs
from pytest_multigpu.planning.replay import NEW_TOKENS, Loaded, replay
from pytest_multigpu.planning.use import Use
from pytest_multigpu.records.plan import Architecture
from pytest_multigpu.units import GIB, MIB

Make = Callable[..., Architecture]
BARE = Costs(
    hardware="none",
    versions="",
    context_bytes=100 * MIB,
    module_bytes=10 * MIB,
    workspace_bytes=32 * MIB,
    dequantise_above_tokens=16,
)
CACHE = {
    "hidden": 64,
    "intermediate": 64,
    "heads": 32,
    "kv_heads": 32,
    "head_dim": 64,
    "vocab": 100,
}
"""Nearly all that it holds is its cache: 2 x 32 x 64 values a token against 64."""
ONE = {"layers": 1, "hidden": 512, "intermediate": 4096, "heads": 4, "kv_heads": 1, "vocab": 500}


def on_one(model: Architecture, context: int, *, batch: int = 1, new: int = NEW_TOKENS) -> Use:
    placed = {block.name: 0 for block in model.blocks}
    return replay(model, placed, {0: BARE}, context_tokens=context, batch=batch, new_tokens=new)[0]


def test_as_many_tokens_are_generated_as_the_check_generates() -> None:
    assert NEW_TOKENS == measured.NEW_TOKENS


@pytest.mark.parametrize(("context", "new"), [(40, 30), (40, 39), (3, 1)])
def test_the_cache_grows_by_a_token_at_each_step(context: int, new: int, make_llama: Make) -> None:
    layers, batch = 3, 64
    model = make_llama(layers=layers, **CACHE)
    half = 32 * 64 * 2 * batch
    # At the last step of the last layer: all others have grown; its keys are new, and while its
    # values are joined the old ones are there too.
    held = (layers - 1) * 2 * context * half + (2 * context + context - 1) * half
    rest = on_one(model, context, batch=batch, new=new).allocated_peak_bytes - held
    assert 0 <= rest - model.weights_bytes - BARE.workspace_bytes < 2 * MIB


def test_a_step_is_a_pass_of_one_token(make_llama: Make) -> None:
    """After a prompt of one token it takes what the prompt took, and the cache of one more."""
    model, batch = make_llama(**ONE), 40_000
    one, two = (on_one(model, context, batch=batch).allocated_peak_bytes for context in (1, 2))
    # 19.5 MiB more of cache; blocks are split to within 1 MiB.
    assert abs(two - one - 2 * 128 * 2 * batch) < 2 * MIB
    # There is one even if none was asked for.
    assert on_one(model, 2, batch=batch, new=0) == on_one(model, 2, batch=batch, new=1)
    # What is not generated is the prompt.
    prompts = [on_one(model, 3, batch=batch, new=1), on_one(model, 12, batch=batch, new=10)]
    assert prompts[0].peaks.prefill_bytes == prompts[1].peaks.prefill_bytes
    shorter = on_one(model, 2, batch=batch, new=1).peaks.prefill_bytes
    assert prompts[0].peaks.prefill_bytes > shorter + 512 * 2 * batch
    # And it has one token at least.
    assert on_one(model, 2, batch=batch, new=2) == on_one(model, 2, batch=batch, new=1)
    assert on_one(model, 1, batch=batch, new=0) == on_one(model, 1, batch=batch, new=1)


def test_the_first_step_takes_small_blocks_that_the_prompt_did_not(make_llama: Make) -> None:
    # 64 sequences: three of 0.5 MiB in the middle of a layer, where the prompt's were larger.
    found = on_one(make_llama(**ONE), 201, batch=64, new=1).peaks
    assert found.decode_bytes - found.prefill_bytes == 2 * MIB


def test_a_probe_starts_from_the_loaded_model_and_keeps_a_layers_output(make_llama: Make) -> None:
    model = make_llama(**{**ONE, "hidden": 1024, "layers": 4})
    placed = {block.name: 0 for block in model.blocks}
    loaded = Loaded(model, placed, {0: BARE})
    use, without = (
        loaded.run(context_tokens=20_000, batch=1, probe=probe)[0] for probe in (True, False)
    )
    assert without.peaks == replace(use.peaks, probe_bytes=0)
    assert without.least_bytes <= use.least_bytes
    # 39 MiB of the first layer's output, when a later layer is at its worst; no cache.
    more = use.parts["probe"].activations_bytes - use.parts["prefill"].activations_bytes
    assert 38 * MIB <= more < 41 * MIB
    assert use.parts["probe"].kv_bytes == 0
    shorter = loaded.run(context_tokens=20_000, batch=1, new_tokens=10_000)[0]
    assert shorter.peaks.probe_bytes < use.peaks.probe_bytes - 39 * MIB


def test_loading_alone_does_not_depend_on_the_context(make_llama: Make) -> None:
    model = make_llama("8bit", **{**ONE, "intermediate": 65536})
    loaded = Loaded(model, {block.name: 0 for block in model.blocks}, {0: BARE})
    short, long = (loaded.run(context_tokens=n, batch=1)[0].peaks for n in (2, 3000))
    assert short.load_bytes == long.load_bytes
    assert short.prefill_bytes < long.prefill_bytes
    # What scratch loading took, a prompt does not count again.
    assert short.prefill_bytes < short.load_bytes + BARE.module_bytes


def limited(model: Architecture, *limits: int, context: int = 3000) -> dict[int, Use]:
    count = len(limits)
    placed = {
        block.name: 0 if block.layer is None else block.layer % count for block in model.blocks
    }
    loaded = Loaded(model, placed, dict.fromkeys(range(count), BARE))
    return loaded.run(
        context_tokens=context, batch=1, limits=dict(enumerate(limits)), enough_if_short=True
    )


def test_a_gpu_that_is_short_is_told_with_what_it_lacks(make_llama: Make) -> None:
    model = make_llama(**{**ONE, "layers": 4})
    enough = limited(model, GIB, GIB)
    assert [use.missing_bytes for use in enough.values()] == [0, 0]
    assert all(use.peaks.probe_bytes for use in enough.values())
    # The second GPU alone is short, between loading and a prompt; the probe is then left out.
    peaks = enough[1].peaks
    limit = (peaks.load_bytes + peaks.worst_bytes) // 2
    short = limited(model, GIB, limit)
    assert short[0].missing_bytes == 0
    assert 0 < short[1].missing_bytes <= peaks.worst_bytes - limit
    assert [use.peaks.probe_bytes for use in short.values()] == [0, 0]


def test_a_probe_is_replayed_on_a_short_gpu_too(make_llama: Make) -> None:
    model = make_llama(**ONE)
    loaded = Loaded(model, {block.name: 0 for block in model.blocks}, {0: BARE})
    short = loaded.run(context_tokens=3000, batch=1, limits={0: 0})[0]
    assert short.missing_bytes > 0
    assert short.peaks.probe_bytes > short.peaks.load_bytes


def test_logits_are_made_for_one_token_of_each_sequence(make_llama: Make) -> None:
    vocab, batch = 200_000, 64
    model = make_llama(**{**ONE, "hidden": 64, "intermediate": 64, "vocab": vocab})
    found = on_one(model, 100, batch=batch).allocated_peak_bytes
    # In 16 bit and then in fp32; beside weights, workspace and cache.
    logits = batch * vocab * (2 + 4)
    rest = found - logits - model.weights_bytes - BARE.workspace_bytes - 100 * batch * 512
    assert 0 <= rest < 16 * MIB  # a row too many or too few: 24 MiB


def test_the_fewest_bytes_are_those_of_the_worst_phase(make_llama: Make) -> None:
    """Here the cache, which a probe does not have."""
    model = make_llama(layers=4, **CACHE)
    loaded = Loaded(model, {block.name: 0 for block in model.blocks}, {0: BARE})
    found = loaded.run(context_tokens=20_000, batch=2)[0]
    assert found.least_bytes > 4 * 20_000 * 2 * 2 * 32 * 64 * 2
    assert found.least_bytes > found.peaks.probe_bytes


def test_loading_has_no_kernels_beside_it(make_llama: Make) -> None:
    """Scratch that loading takes is more than they are, and than a pass of one token."""
    model = make_llama("8bit", **{**ONE, "layers": 4, "intermediate": 65536})
    loaded = limited(model, GIB * 8)[0].peaks.load_bytes
    assert limited(model, loaded, context=1)[0].missing_bytes == 0
    assert limited(model, loaded, context=1)[0].least_bytes <= loaded
    assert limited(model, loaded - 1, context=1)[0].missing_bytes == 1
    # Nothing at all is left: all of it is missing.
    assert limited(model, 0, context=1)[0].missing_bytes > 10 * MIB


@pytest.mark.parametrize("context", [200, 3000])
def test_about_the_fewest_bytes_that_do(context: int, make_llama: Make) -> None:
    model = make_llama(**{**ONE, "layers": 4})
    roomy = limited(model, 4 * GIB, context=context)[0]
    low, high = 0, 4 * GIB
    while high - low > MIB // 4:
        middle = (low + high) // 2
        if limited(model, middle, context=context)[0].missing_bytes:
            low = middle
        else:
            high = middle
    assert abs(roomy.least_bytes - high) <= 0.05 * high
    assert roomy.least_bytes <= roomy.peaks.worst_bytes
