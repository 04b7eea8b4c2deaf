"""Models unlike Llama: the pass as recorded and replayed, against a real one on the CPU.

The counted pass is transformers' own with data and routing; a release that runs a family in
another way changes both, or is seen here.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from live_bytes import peak_bytes
from tiny_families import DEEPSEEK

from pytest_multigpu.model import architecture, passes
from pytest_multigpu.model.architecture import describe
from pytest_multigpu.model.config import ResolvedModel
from pytest_multigpu.model.kv import cache_argument
from pytest_multigpu.planning.allocator import Allocator
from pytest_multigpu.planning.barred import runs_on
from pytest_multigpu.planning.costs import HOPPER, TRAINED_OUTLIERS
from pytest_multigpu.planning.forward import Forward
from pytest_multigpu.planning.gpu import Gpu
from pytest_multigpu.planning.linears import Linears
from pytest_multigpu.planning.peaks import predict
from pytest_multigpu.planning.recorded import Recorded, forward_of
from pytest_multigpu.planning.simulate import simulate
from pytest_multigpu.planning.speed import launched
from pytest_multigpu.records.passes import Phase
from pytest_multigpu.records.plan import Architecture, Tier

TOKENS = 200
SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
WIDE_HEADS = {**SHAPE, "head_dim": 64}
OLD_SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
MOE: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 192}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SHAPE,
    "mistral": {**SHAPE, "sliding_window": 64},
    "mixtral": {**SHAPE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {**SHAPE, "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1},
    "qwen3": WIDE_HEADS,
    "qwen3_moe": {**WIDE_HEADS, **MOE, "num_experts": 8, "decoder_sparse_step": 2},
    "gemma2": {**WIDE_HEADS, "sliding_window": 64},
    "gemma3_text": {**WIDE_HEADS, "sliding_window": 64},
    "phi3": SHAPE,
    "gpt2": {"vocab_size": 300, "n_embd": 256, "n_layer": 3, "n_head": 4, "n_positions": 512},
    "gpt_neox": SHAPE,
    "falcon": {**OLD_SHAPE, "multi_query": True, "new_decoder_architecture": False},
    "bloom": {"vocab_size": 300, "hidden_size": 256, "n_layer": 3, "n_head": 4},
    "opt": {
        **OLD_SHAPE,
        "ffn_dim": 640,
        "max_position_embeddings": 512,
        "word_embed_proj_dim": 256,
    },
    "starcoder2": SHAPE,
    "olmo2": SHAPE,
    "gpt_oss": {**WIDE_HEADS, **MOE, "num_local_experts": 4, "sliding_window": 64},
    "deepseek_v3": {**SHAPE, **DEEPSEEK},
    "cohere": SHAPE,
}
EAGER = {"bloom", "gpt_oss"}
"""Score matrices: with biases on them, with sinks. Gemma 2's, softcapped, in newer versions."""


@cache
def described(family: str, tier: Tier = "16bit") -> Architecture:
    """Recorded, whatever the family."""
    config = {"model_type": family, **FAMILIES[family]}
    resolved = ResolvedModel(name=family, config_dict=config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(architecture, "AS_LLAMA", ())
        return describe(resolved, tier=tier, use_cache=False)


def predicted(model: Architecture, phase: Phase, batch: int, *, tokens: int = TOKENS) -> int:
    gpu = Gpu(allocator=Allocator(), costs=HOPPER)
    forward = forward_of(model, logits_rows=1)
    blocks = [(block, gpu) for block in model.blocks]
    new = tokens
    if phase == "decode":
        new = 1
        for block, _ in blocks:
            if block.kind == "layer":
                gpu.extend_cache(block, tokens - 1, batch, tokens - 1)
        gpu.allocator.restart_peaks()
    forward.run(blocks, tokens=new, batch=batch, total_tokens=tokens, probe=phase == "probe")
    return gpu.allocator.peak_allocated


def counted(family: str, phase: Phase, batch: int) -> int:
    """Bytes alive at the worst moment of a pass; several sequences are of unequal lengths."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache

    config = CONFIG_MAPPING[family].from_dict(dict(FAMILIES[family]))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    ids = torch.randint(3, 300, (batch, TOKENS))
    mask = None
    if batch > 1:
        mask = torch.ones_like(ids)
        mask[1:, :7] = 0
    runs = model.get_decoder() if phase == "probe" else model
    kept = DynamicCache(config=config)
    settings = {cache_argument(model): kept, "use_cache": True, "logits_to_keep": 1}
    if phase == "probe":
        settings = {"use_cache": False}
    positions = torch.arange(TOKENS).repeat(batch, 1)

    def run(first: int, last: int) -> Any:
        # As generate and a probe do: each sequence has positions of its own.
        known = "position_ids" in inspect.signature(runs.forward).parameters
        more = {"position_ids": positions[:, first:last]} if known else {}
        seen = None if mask is None else mask[:, :last]
        return runs(ids[:, first:last], attention_mask=seen, **more, **settings)

    if phase != "decode":
        return peak_bytes(model, lambda: run(0, TOKENS))
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("batched_mm")  # as generate does on a GPU
    with torch.no_grad():
        run(0, TOKENS - 1)
    return peak_bytes(model, lambda: run(TOKENS - 1, TOKENS), cache=kept)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_takes_what_was_recorded(family: str, batch: int) -> None:
    model = described(family)
    if family != "gemma2":
        assert model.attention == ("eager" if family in EAGER else "sdpa")
    assert model.unknown == ()
    # Of models this small, the few bytes a token that are left out are about a hundredth.
    assert predicted(model, "prefill", batch) == pytest.approx(
        counted(family, "prefill", batch), rel=0.03
    )


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_a_decode_step_gathers_the_weights_of_its_experts(family: str, batch: int) -> None:
    found = predicted(described(family), "decode", batch)
    assert found == pytest.approx(counted(family, "decode", batch), rel=0.05)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("family", ["mistral", "mixtral", "gemma2", "gpt2"])
def test_a_probe_takes_what_was_recorded_and_keeps_a_layers_output(family: str, batch: int) -> None:
    kept = batch * TOKENS * 256 * 2
    found = predicted(described(family), "probe", batch)
    assert found == pytest.approx(counted(family, "probe", batch) + kept, rel=0.03)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_window_is_shorter_than_the_prompt_and_the_cache(batch: int) -> None:
    model = described("mistral")
    assert model.passes is not None
    assert model.passes.window == 64
    found = predicted(model, "decode", batch)
    assert found == pytest.approx(counted("mistral", "decode", batch), rel=0.05)


def test_from_the_window_on_one_sequence_has_a_mask_too() -> None:
    windowed, plain = described("mistral"), described("llama")
    for tokens, mask in ((63, 0), (64, 64 * 64), (480, 480 * 480)):
        less = predicted(plain, "prefill", 1, tokens=tokens)
        assert predicted(windowed, "prefill", 1, tokens=tokens) == less + mask


@pytest.mark.parametrize("phase", ["prefill", "decode", "probe"])
@pytest.mark.parametrize("batch", [1, 3])
def test_llamas_formulas_agree_with_a_recording(phase: Phase, batch: int) -> None:
    recorded = described("llama")
    by_hand = replace(recorded, passes=None)
    assert isinstance(forward_of(recorded, logits_rows=1), Recorded)
    assert type(forward_of(by_hand, logits_rows=1)) is Forward
    assert predicted(recorded, phase, batch, tokens=480) == pytest.approx(
        predicted(by_hand, phase, batch, tokens=480), rel=0.01
    )


def test_what_a_decode_step_launches_was_recorded() -> None:
    """Norms of one kernel, or of six; experts that are chosen; norms of queries and keys."""
    recorded = described("llama")
    assert launched(recorded) == launched(replace(recorded, passes=None)) == (120, 21)
    kernels = {family: launched(described(family))[0] for family in FAMILIES}
    assert kernels["gpt_neox"] < 100 < kernels["llama"]
    assert kernels["llama"] < kernels["mixtral"] < kernels["qwen3_moe"]
    assert kernels["llama"] < kernels["gemma2"]
    assert launched(described("llama", "8bit")) == (120, 21)


def test_llamas_formulas_are_used_for_what_is_like_it() -> None:
    for family in ("llama", "qwen2", "mistral"):
        config = {"model_type": family, **SHAPE, "sliding_window": None}
        found = describe(ResolvedModel(name=family, config_dict=config), tier="16bit")
        assert found.passes is None, family
    # A window masks a long prompt; eager attention has score matrices.
    for family, more in (
        ("mistral", {"sliding_window": 64}),
        ("llama", {"attn_implementation": "eager"}),
    ):
        config = {"model_type": family, **SHAPE, **more}
        found = describe(ResolvedModel(name=family, config_dict=config), tier="16bit")
        assert found.passes is not None, family


def test_in_4_bit_a_prompt_dequantises_and_experts_stay() -> None:
    """Linears of the layers are quantised; experts that are one tensor are not."""
    for family, more in (("phi3", 640 * 2 * 256 * 2), ("mixtral", 0)):
        plain, quantised = described(family), described(family, "4bit")
        assert quantised.passes == plain.passes
        assert isinstance(forward_of(quantised, logits_rows=1), Recorded)
        grown = predicted(quantised, "prefill", 1) - predicted(plain, "prefill", 1)
        # phi3 makes gate and up in one, with the dequantised weight beside them.
        assert grown <= more, family
        assert bool(grown) is bool(more), family


def test_a_masked_pass_on_a_second_gpu_copies_what_its_layers_get() -> None:
    model = described("gpt_oss")
    tokens, batch = 480, 2
    gpus = [Gpu(allocator=Allocator(), costs=HOPPER) for _ in range(2)]
    place = {block.name: gpus[block.layer == 2 or block.kind == "head"] for block in model.blocks}
    forward_of(model, logits_rows=1).run(
        [(block, place[block.name]) for block in model.blocks],
        tokens=tokens,
        batch=batch,
        total_tokens=tokens,
    )
    whole = predicted(model, "prefill", batch, tokens=tokens)
    # Alone, the third layer finds two masks in 16 bit, the embeddings and the others' cache; on
    # the second GPU a copy of its mask, of its input and of the positions.
    mask, embeddings, positions = tokens * tokens * 2, tokens * 256 * 2, tokens * 8
    others = 2 * tokens * 2 * 2 * 64 * 2
    less = batch * (mask + embeddings + others - positions)
    assert gpus[1].allocator.peak_allocated == whole - less
    cached = [sum(b.kv_bytes_per_token for b in model.blocks[:n]) for n in (3, 4)]
    left = [gpu.allocator.allocated for gpu in gpus]
    assert left == [cached[0] * tokens * batch, (cached[1] - cached[0]) * tokens * batch]
    assert [gpu.allocator.kv for gpu in gpus] == left
    assert [gpu.allocator.logits for gpu in gpus] == [0, 0]


def test_nothing_is_left_of_a_pass_but_its_cache() -> None:
    for family in FAMILIES:
        model, gpu = described(family), Gpu(allocator=Allocator(), costs=HOPPER)
        forward = forward_of(model, logits_rows=1)
        blocks = [(block, gpu) for block in model.blocks]
        for probe in (True, False):
            forward.run(blocks, tokens=300, batch=2, total_tokens=300, probe=probe)
            kept = sum(block.kv_bytes_per_token for block in model.blocks) * 600
            assert gpu.allocator.kv == (0 if probe else kept), family
            # Blocks are multiples of 512 bytes.
            assert 0 <= gpu.allocator.allocated - gpu.allocator.kv <= 6 * 512, family


def test_what_the_linears_get_is_noted() -> None:
    for family in FAMILIES:
        passes_found = described(family).passes
        assert passes_found is not None
        # LLM.int8 refuses the one, and makes much of outliers in the other.
        deep = ("kv_b_proj",) if family == "deepseek_v3" else ()
        bare = {"olmo2": ("k_proj", "q_proj", "v_proj")}.get(family, ())
        assert (passes_found.deep_inputs, passes_found.bare_inputs) == (deep, bare), family


def test_int8_refuses_an_input_of_four_dimensions() -> None:
    for tier in ("16bit", "4bit"):
        assert described("deepseek_v3", tier).refused == ()
    model = described("deepseek_v3", "8bit")
    sentence = (
        "LLM.int8 takes inputs of two or three dimensions; "
        "DeepseekV3ForCausalLM gives kv_b_proj four"
    )
    assert model.refused == (sentence,)
    plan = predict(
        model,
        {"": 0},
        simulate("1xH100"),
        context_tokens=64,
        batch=1,
        weights="synthetic",
        placement="auto",
    )
    assert (plan.fits, plan.reasons) == (False, (sentence,))
    assert not runs_on((9, 0), model)
    assert not runs_on(None, model)


@pytest.mark.parametrize("recorded", [True, False])
def test_outliers_begin_in_a_layer_however_it_is_replayed(
    recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = described("llama", "8bit")
    assert model.passes is not None
    if not recorded:
        model = replace(model, passes=None)
    seen: list[float] = []
    run = Linears.run

    def watched(*arguments: Any, outliers: float = 0.0) -> Any:
        seen.append(outliers)
        return run(*arguments, outliers=outliers)

    monkeypatch.setattr(Linears, "run", watched)
    gpu = Gpu(allocator=Allocator(), costs=HOPPER.as_trained(1))
    forward_of(model, logits_rows=1).run(
        [(block, gpu) for block in model.blocks], tokens=TOKENS, batch=1, total_tokens=TOKENS
    )
    attended = HOPPER.int8_outliers_attended

    def layer(share: float) -> list[float]:
        return [share] * 3 + [attended] + [share] * 2 + [0.0]

    assert seen == [*layer(0.0), *layer(TRAINED_OUTLIERS), *layer(TRAINED_OUTLIERS)]


def test_int8s_outliers_are_unknown_without_a_norm() -> None:
    assert described("olmo2", "8bit").unknown == (
        "k_proj, q_proj, v_proj take what the layer before gives, without a norm of their own: how "
        "many of its columns LLM.int8 multiplies in 16 bit hangs on the weights, and is counted as "
        "Llama's; an OLMo 2 32B took 7 GiB more",
    )
    for tier in ("16bit", "4bit"):
        assert described("olmo2", tier).unknown == ()
    assert described("qwen3", "8bit").unknown == ()


@pytest.mark.parametrize("tier", ["8bit", "4bit"])
def test_experts_that_are_no_linears_are_counted(tier: Tier) -> None:
    model = described("mixtral", tier)
    experts = 3 * 4 * (2 * 640 * 256 + 256 * 640) * 2
    router = 3 * 4 * 256 * 2
    assert model.unquantised_bytes == experts + router
    attention = 3 * (2 * 256 * 256 + 2 * 128 * 256)
    assert sum(block.quantised_parameters for block in model.blocks) == attention
    assert sum(block.quantised_parameters for block in described("mixtral").blocks) == 0
    assert described("mixtral").unquantised_bytes == 0
    assert described("llama", tier).unquantised_bytes == 0


def test_what_cannot_be_recorded_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(passes, "run_pass", fail)
    monkeypatch.setattr(passes, "_last", None)
    config = {"model_type": "phi3", **SHAPE}
    found = describe(ResolvedModel(name="phi3", config_dict=config), tier="16bit", use_cache=False)
    assert found.passes is None
    assert found.unknown == (
        "what its layers take in a pass could not be recorded on the meta device "
        "(NotImplementedError); activations are counted as Llama's of the same sizes",
    )
