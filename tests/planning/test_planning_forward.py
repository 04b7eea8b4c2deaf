"""One pass over one layer: what is held at its worst moment, by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from pytest_multigpu.planning.allocator import Allocator, Held
from pytest_multigpu.planning.costs import HOPPER, OTHER, Costs, costs_for
from pytest_multigpu.planning.forward import Forward, Gpu
from pytest_multigpu.planning.load import TABLE_VALUES, load, tensor_sizes
from pytest_multigpu.records.plan import Architecture, Tier, WeightsSource
from pytest_multigpu.units import GIB, MIB

Make = Callable[..., Architecture]
T = 2048
H, WIDE = T * 8192 * 2, T * 28672 * 2
COSINES, KV = 2 * T * 128 * 2, T * 4096
WEIGHT = 28672 * 8192 * 2
KV_WEIGHT = 1024 * 8192 * 2
TABLE = TABLE_VALUES * 2


def run(model: Architecture, *, tokens: int = T, probe: bool = False) -> Gpu:
    gpu = Gpu(allocator=Allocator(), costs=HOPPER)
    blocks = [(block, gpu) for block in model.blocks]
    Forward(model, logits_rows=1).run(
        blocks, tokens=tokens, batch=1, total_tokens=tokens, probe=probe
    )
    return gpu


@pytest.mark.parametrize(
    ("tier", "at_once"),
    [
        # Residual, its normed copy and the layer's input, which is the embeddings' output; then
        # activated gate, up and their product.
        ("16bit", 3 * H + 3 * WIDE),
        # While up is made: activated gate, the dequantised weight, up.
        ("4bit", 3 * H + 2 * WIDE + WEIGHT),
        # While up is made: activated gate, int8 input, int32 product, its fp16 form, up.
        ("8bit", 3 * H + WIDE + T * 8192 + 2 * WIDE + WIDE + WIDE),
    ],
)
def test_the_worst_moment_of_a_layer(tier: Tier, at_once: int, make_llama: Make) -> None:
    gpu = run(make_llama(tier, layers=1))
    assert gpu.allocator.peak_allocated == at_once + COSINES + KV


def test_only_the_cache_is_left_after_a_pass(make_llama: Make) -> None:
    gpu = run(make_llama(layers=3))
    assert gpu.allocator.allocated == 3 * KV
    assert run(make_llama(layers=3), probe=True).allocator.allocated == 0


def test_few_tokens_are_multiplied_without_dequantising(make_llama: Make) -> None:
    model = make_llama("4bit", layers=1)
    assert run(model, tokens=16).allocator.peak_allocated < WEIGHT  # down's limit, see nf4.py
    assert run(model, tokens=17).allocator.peak_allocated >= WEIGHT


def test_a_window_keeps_the_whole_prompt_until_the_next_step(make_llama: Make) -> None:
    model = make_llama(layers=1)
    model = replace(model, blocks=tuple(replace(b, kv_window=1024) for b in model.blocks))
    gpu = run(model)
    assert gpu.allocator.allocated == KV
    layer = [(model.blocks[1], gpu)]
    Forward(model, logits_rows=1).extend(layer, batch=1, total_tokens=T + 1)
    assert gpu.allocator.allocated == 1024 * 4096


def test_the_second_gpu_holds_a_copy_of_its_input_and_no_embeddings(make_llama: Make) -> None:
    model = make_llama(layers=2)
    first, second = (Gpu(allocator=Allocator(), costs=HOPPER) for _ in range(2))
    place = dict(zip(model.blocks, [first, first, second, second, second], strict=True))
    Forward(model, logits_rows=1).run(
        list(place.items()), tokens=T, batch=1, total_tokens=T, probe=False
    )
    assert second.allocator.peak_allocated == 3 * H + 3 * WIDE + COSINES + KV
    assert first.allocator.allocated == second.allocator.allocated == KV


@pytest.mark.parametrize(
    ("tier", "weights", "scratch"),
    [
        ("16bit", "synthetic", TABLE),
        ("4bit", "synthetic", TABLE + WEIGHT),
        ("8bit", "synthetic", TABLE + 2 * WEIGHT),
        ("16bit", "checkpoint", 0),
        ("4bit", "checkpoint", 2 * WEIGHT),
        ("8bit", "checkpoint", 3 * WEIGHT),
    ],
)
def test_loading_takes_the_weights_and_the_scratch(
    tier: Tier, weights: WeightsSource, scratch: int, make_llama: Make
) -> None:
    model = make_llama(tier, layers=2)
    gpu = Gpu(allocator=Allocator(), costs=HOPPER)
    load(gpu, model, model.blocks, weights)
    rounding = 4 * MIB
    assert 0 <= gpu.allocator.peak_reserved - model.weights_bytes - scratch <= rounding
    assert 0 <= gpu.allocator.reserved - model.weights_bytes <= rounding
    for block in model.blocks:
        assert sum(tensor_sizes(model, block)) == block.weights_bytes


def test_costs_by_compute_capability() -> None:
    assert costs_for((9, 0)) is HOPPER
    assert costs_for((8, 6)) is costs_for(None) is OTHER


def test_attention_is_the_worst_moment_of_a_narrow_model(make_llama: Make) -> None:
    model = make_llama(layers=1, hidden=256, intermediate=1, heads=16, kv_heads=1, vocab=300)
    h, q, kv = T * 256 * 2, T * 2048 * 2, T * 128 * 2
    # Embeddings and their normed copy; q, k and v; and three of q while it is rotated.
    assert run(model).allocator.peak_allocated == 2 * h + (q + 2 * kv) + 3 * q + COSINES


def test_a_probe_keeps_a_layers_output_and_no_cache(make_llama: Make) -> None:
    model = make_llama(layers=3)
    # As in any later layer, with the embeddings beside its input; and the first layer's output.
    at_once = (4 * H + 3 * WIDE) + H
    assert run(model, probe=True).allocator.peak_allocated == at_once + COSINES


def head_of(gpus: list[Gpu], model: Architecture, *, tokens: int, batch: int) -> None:
    """Embeddings and layers on the first, norm on the second, head on the last GPU."""
    place = [*[gpus[0]] * (len(model.blocks) - 2), gpus[1], gpus[-1]]
    Forward(model, logits_rows=1).run(
        list(zip(model.blocks, place, strict=True)), tokens=tokens, batch=batch, total_tokens=tokens
    )


def test_logits_are_made_on_the_heads_gpu_and_used_on_the_first(make_llama: Make) -> None:
    model = make_llama(
        layers=1, hidden=64, intermediate=64, heads=1, kv_heads=1, head_dim=64, vocab=64000
    )
    gpus = [Gpu(allocator=Allocator(), costs=HOPPER) for _ in range(3)]
    head_of(gpus, model, tokens=4, batch=3)
    logits, cache = 3 * 64000 * 2, 2 * 3 * 4 * 64 * 2
    # In the model's dtype as moved, then in fp32.
    assert gpus[0].allocator.peak_allocated == logits + 2 * logits + cache
    assert gpus[1].allocator.peak_allocated < logits
    assert gpus[2].allocator.peak_allocated == logits
    one = [Gpu(allocator=Allocator(), costs=HOPPER)] * 2
    head_of(one, model, tokens=4, batch=3)
    normed = 3 * 4 * 64 * 2
    assert one[0].allocator.peak_allocated == logits + 2 * logits + cache + normed


@pytest.mark.parametrize(
    ("batch", "before", "after"),
    [
        (1, 0, 0),
        (7, 0, 0),
        (8, KV_WEIGHT, 0),  # few rows, so not worth a kernel of their own
        (16, KV_WEIGHT, 0),
        (17, KV_WEIGHT, WEIGHT),
    ],
)
def test_a_decode_step_of_many_sequences_dequantises(
    batch: int, before: int, after: int, make_llama: Make
) -> None:
    model = replace(make_llama("4bit", layers=1), repeats_kv_to_decode=False)
    gpu = Gpu(allocator=Allocator(), costs=HOPPER)
    blocks = [(block, gpu) for block in model.blocks]
    Forward(model, logits_rows=1).extend(blocks, batch=batch, total_tokens=8)
    cache = 8 * 4096 * batch
    assert gpu.allocator.allocated == cache
    assert gpu.allocator.peak_allocated == max(before, cache + after)


def test_16_bit_decode_steps_take_their_cache_alone(make_llama: Make) -> None:
    model = replace(make_llama(layers=1), repeats_kv_to_decode=False)
    model = replace(model, blocks=tuple(replace(b, load_transient_bytes=GIB) for b in model.blocks))
    gpu = Gpu(allocator=Allocator(), costs=HOPPER)
    blocks = [(block, gpu) for block in model.blocks]
    Forward(model, logits_rows=1).extend(blocks, batch=17, total_tokens=8)
    assert gpu.allocator.peak_allocated == 8 * 4096 * 17


def test_decode_steps_repeat_k_and_v_for_all_query_heads(make_llama: Make) -> None:
    gpu = Gpu(allocator=Allocator(), costs=HOPPER)
    blocks = [(block, gpu) for block in make_llama(layers=1).blocks]
    for batch, repeated in ((1, 0), (16, 2 * 16 * 1024 * 8192 * 2)):
        gpu = Gpu(allocator=Allocator(), costs=HOPPER)
        blocks = [(block, gpu) for block, _ in blocks]
        Forward(make_llama(layers=1), logits_rows=1).extend(blocks, batch=batch, total_tokens=1024)
        assert gpu.allocator.allocated == batch * 1024 * 4096
        assert gpu.allocator.peak_allocated == batch * 1024 * 4096 + repeated


def test_a_windows_cache_after_a_decode_step_of_two_sequences(make_llama: Make) -> None:
    model = make_llama(layers=1)
    model = replace(model, blocks=tuple(replace(b, kv_window=1024) for b in model.blocks))
    gpu = Gpu(allocator=Allocator(), costs=HOPPER)
    blocks = [(block, gpu) for block in model.blocks]
    forward = Forward(model, logits_rows=1)
    forward.run(blocks, tokens=1024, batch=2, total_tokens=1024)
    assert gpu.allocator.allocated == 2 * 1024 * 4096
    forward.run(blocks, tokens=1, batch=2, total_tokens=1025)
    assert gpu.allocator.allocated == 2 * 1024 * 4096
    forward.run(blocks, tokens=5, batch=2, total_tokens=1030)
    assert gpu.allocator.allocated == 2 * (1023 + 5) * 4096


def narrow(make: Make, **more: object) -> Architecture:
    """Attention is its worst moment."""
    return make(layers=1, hidden=64, intermediate=1, heads=16, kv_heads=1, vocab=300, **more)


@pytest.mark.parametrize(("tokens", "unaligned"), [(512, 0), (509, 509 * 512 * 2)])
@pytest.mark.parametrize("costs", [HOPPER, OTHER])
def test_sequences_of_unequal_lengths_have_masks(
    costs: Costs, tokens: int, unaligned: int, make_llama: Make
) -> None:
    """While the kernel runs: embeddings and their normed copy, query, K and V for all heads and in
    the cache, output and statistics; the mask and the kernel's own, in 16 bit."""
    batch, heads = 3, 16
    t, gpu = batch * tokens, Gpu(allocator=Allocator(), costs=costs)
    model = narrow(make_llama)
    blocks = [(block, gpu) for block in model.blocks]
    Forward(model, logits_rows=1).run(blocks, tokens=tokens, batch=batch, total_tokens=tokens)
    query, angles = t * heads * 128 * 2, 2 * t * 128 * 2
    mask = batch * tokens * tokens
    held = 2 * t * 64 * 2 + angles + t * 512 + 4 * query + t * heads * 4
    copies = mask * 2 + (batch * unaligned if costs is OTHER else 0)
    # A block may be larger than what is in it.
    assert 0 <= gpu.allocator.peak_allocated - (held + mask + copies) < MIB
    assert gpu.allocator.kv == t * 512
    assert 0 <= gpu.allocator.allocated - t * 512 < 2 * 512


def test_one_sequence_has_no_mask(make_llama: Make) -> None:
    gpu = run(narrow(make_llama), tokens=512)
    query = 512 * 16 * 128 * 2
    # Query, K and V, and three of the query's size while it is rotated.
    held = 2 * 512 * 64 * 2 + 2 * 512 * 128 * 2 + 4 * query + 512 * 512
    assert gpu.allocator.peak_allocated == held


@pytest.mark.parametrize("repeats", [True, False])
def test_a_masked_step_repeats_k_and_v_where_transformers_does(
    repeats: bool, make_llama: Make
) -> None:
    batch, total = 8, 4096
    model = replace(narrow(make_llama), repeats_kv_to_decode=repeats)
    gpu = Gpu(allocator=Allocator(), costs=HOPPER)
    blocks = [(block, gpu) for block in model.blocks]
    Forward(model, logits_rows=1).run(blocks, tokens=1, batch=batch, total_tokens=total)
    cache, repeated = batch * total * 512, 2 * batch * total * 16 * 128 * 2
    more = gpu.allocator.peak_allocated - cache - (repeated if repeats else 0)
    assert 0 < more < MIB


def test_every_layer_on_a_second_gpu_has_a_copy_of_the_mask(make_llama: Make) -> None:
    model = make_llama(layers=2)
    first, second = (Gpu(allocator=Allocator(), costs=HOPPER) for _ in range(2))
    place = dict(zip(model.blocks, [first, first, second, second, second], strict=True))
    Forward(model, logits_rows=1).run(
        list(place.items()), tokens=T, batch=2, total_tokens=T, probe=True
    )
    one = Gpu(allocator=Allocator(), costs=HOPPER)
    place = dict.fromkeys(model.blocks, one)
    Forward(model, logits_rows=1).run(
        list(place.items()), tokens=T, batch=2, total_tokens=T, probe=True
    )
    # Alone it holds embeddings too, and no copies.
    assert second.allocator.peak_allocated == one.allocator.peak_allocated - 2 * H
    assert first.allocator.allocated == second.allocator.allocated == 0


def test_a_window_joins_k_and_v_before_it_releases_either(make_llama: Make) -> None:
    block = replace(make_llama(layers=1).blocks[1], kv_window=1024)
    for window, beside in ((1024, 2), (None, 1)):
        gpu = Gpu(allocator=Allocator(), costs=HOPPER)
        for new, total in ((T, T), (1, T + 1)):
            gpu.allocator.restart_peaks()
            gpu.extend_cache(replace(block, kv_window=window), new, 1, total)
        old, kept = T * 2048, (window or T + 1) * 2048
        # V is joined with the old V, and with the old K where there is a window.
        most = 2 * kept + old * (beside - 1) + old
        assert gpu.allocator.peak_allocated == most
        assert gpu.allocator.allocated == gpu.allocator.kv == 2 * kept


def test_each_dtype_takes_its_size(make_llama: Make) -> None:
    worst = 3 * H + 3 * WIDE + COSINES + KV
    model = make_llama(layers=1)
    assert run(replace(model, dtype="float16")).allocator.peak_allocated == worst
    assert run(make_llama(layers=1, size=4)).allocator.peak_allocated == 2 * worst


def test_int8_in_float16_needs_no_copies(make_llama: Make) -> None:
    model = replace(make_llama("8bit", layers=1), dtype="float16")
    # As in bfloat16, without the second form of the result.
    at_once = 3 * H + WIDE + T * 8192 + 2 * WIDE + WIDE
    assert run(model).allocator.peak_allocated == at_once + COSINES + KV


@pytest.mark.parametrize("written", [True, False])
def test_statistics_of_attention_where_the_kernel_writes_them(
    make_llama: Make, monkeypatch: pytest.MonkeyPatch, written: bool
) -> None:
    taken: list[int] = []
    take = Allocator.take

    def noted(self: Allocator, size: int) -> Held:
        taken.append(size)
        return take(self, size)

    model = make_llama(layers=3, hidden=896, intermediate=2048, heads=7, kv_heads=7)
    gpu = Gpu(allocator=Allocator(), costs=replace(HOPPER, attention_statistics=written))
    monkeypatch.setattr(Allocator, "take", noted)
    blocks = [(block, gpu) for block in model.blocks]
    Forward(model, logits_rows=1).run(blocks, tokens=1001, batch=1, total_tokens=1001)
    # The log-sum-exp of each layer's 1001 tokens and 7 heads, in fp32.
    assert taken.count(1001 * 7 * 4) == 3 * written
