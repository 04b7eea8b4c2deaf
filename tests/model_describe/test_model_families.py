"""Tiny models of many families: the description against the real model on the CPU."""

from __future__ import annotations

import warnings
from inspect import signature
from typing import Any

import pytest

from pytest_multigpu.model.architecture import describe
from pytest_multigpu.model.config import ResolvedModel
from pytest_multigpu.records.plan import TIERS, Architecture

SHAPE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
OLD_SHAPE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
MOE: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SHAPE,
    "mistral": {**SHAPE, "sliding_window": 8},
    "mixtral": {**SHAPE, **MOE, "num_local_experts": 4},
    "qwen2": {**SHAPE, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    "qwen3": {**SHAPE, "head_dim": 32},
    "qwen3_moe": {**SHAPE, **MOE, "num_experts": 4, "decoder_sparse_step": 2},
    "gemma2": {**SHAPE, "head_dim": 16, "sliding_window": 8},
    "gemma3_text": {**SHAPE, "head_dim": 16, "sliding_window": 8},
    "phi3": SHAPE,
    "gpt2": {"vocab_size": 128, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "gpt_bigcode": {"vocab_size": 128, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "gpt_neox": SHAPE,
    "falcon": {**OLD_SHAPE, "multi_query": True, "new_decoder_architecture": False},
    "olmo2": SHAPE,
    "deepseek_v3": {
        **SHAPE,
        **MOE,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "n_shared_experts": 1,
    },
    "cohere": SHAPE,
    "starcoder2": SHAPE,
    "granite": SHAPE,
    "opt": {**OLD_SHAPE, "ffn_dim": 96, "max_position_embeddings": 64, "word_embed_proj_dim": 64},
    "bloom": {"vocab_size": 128, "hidden_size": 64, "n_layer": 3, "n_head": 4},
    "gpt_oss": {**SHAPE, **MOE, "head_dim": 16, "num_local_experts": 4, "sliding_window": 8},
}
TOKENS = 12
"""More than the windows of 8."""


def resolved(family: str) -> ResolvedModel:
    return ResolvedModel(name=family, config_dict={"model_type": family, **FAMILIES[family]})


def real_model(family: str) -> Any:
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[family].from_dict(dict(resolved(family).config_dict))
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def cached_bytes(found: Architecture) -> list[int]:
    """After TOKENS tokens; transformers keeps one token less than the window between steps."""
    return [
        block.kv_bytes_per_token
        * (TOKENS if block.kv_window is None else min(TOKENS, block.kv_window - 1))
        for block in found.blocks
        if block.kind == "layer"
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_and_cache_of_the_real_model(family: str) -> None:
    import torch

    model = real_model(family)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # of arguments that will be dropped
        found = describe(resolved(family), tier="16bit")
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.weights_bytes == sum(parameter.nbytes for parameter in model.parameters())
    assert found.layers == model.config.num_hidden_layers
    with torch.inference_mode():
        cache = model(torch.ones(1, TOKENS, dtype=torch.long), use_cache=True).past_key_values
    kept = [(layer.keys.numel() + layer.values.numel()) * 2 for layer in cache.layers]
    assert cached_bytes(found) == kept
    assert found.unknown == ()
    assert_every_parameter_is_in_one_block(model, found)


def assert_every_parameter_is_in_one_block(model: Any, found: Architecture) -> None:
    names = [block.name for block in found.blocks]
    assert len(set(names)) == len(names)
    for name, _ in model.named_parameters(remove_duplicate=False):
        owners = [block for block in names if name == block or name.startswith(f"{block}.")]
        assert len(owners) == 1, name
    layers = [block.layer for block in found.blocks if block.kind == "layer"]
    assert layers == list(range(found.layers))
    assert [block.kind for block in found.blocks].count("head") == 1
    assert found.blocks[0].kind == "embedding"
    assert found.blocks[-1].kind == "head"


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "opt", "bloom", "cohere"])
def test_tied_heads_weigh_nothing(family: str) -> None:
    for tier in TIERS:
        found = describe(resolved(family), tier=tier)
        head = found.blocks[-1]
        assert (head.kind, head.tied_to, head.weights_bytes) == ("head", found.blocks[0].name, 0)
        assert found.blocks[0].weights_bytes == 128 * 64 * 2


def test_fused_experts_stay_16_bit() -> None:
    """bitsandbytes replaces Linears; experts kept as one parameter are none."""
    plain, quantised = (describe(resolved("mixtral"), tier=tier) for tier in ("16bit", "4bit"))
    # 4 layers of q and o (64 x 64), k and v (64 x 32): all that is left to quantise.
    linears = 4 * (2 * 64 * 64 + 2 * 64 * 32)
    in_4bit = linears // 2 + linears // 64 * 4 + 16 * 64
    assert quantised.weights_bytes == plain.weights_bytes - 2 * linears + in_4bit


def test_recurrent_layers_are_named_as_unknown() -> None:
    config = {
        **SHAPE,
        "model_type": "jamba",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
        "use_mamba_kernels": False,
    }
    found = describe(ResolvedModel(name="jamba", config_dict=config), tier="16bit")
    state = (
        "2 of 4 layers keep a recurrent state, 10240 B for each sequence in all, which the plan "
    )
    assert_recurrent(found, f"{state}leaves out")
    per_token = [block.kv_bytes_per_token for block in found.blocks if block.kind == "layer"]
    assert per_token == [0, 128, 0, 128]


def assert_recurrent(found: Architecture, state: str) -> None:
    """Neither the state nor what such layers take in a pass is known."""
    assert found.passes is None
    kept, taken = found.unknown
    assert kept == state
    before, after = (
        "what its layers take in a pass could not be recorded on the meta device (",
        "); activations are counted as Llama's of the same sizes",
    )
    assert taken.removeprefix(before).removesuffix(after) in ("UnclearError", "TooManyStepsError")


@pytest.mark.parametrize(
    ("family", "state"),
    [
        # It keeps its state in modules: 3 x 64 in 16 bit and 64 in fp32 in each of 3 layers.
        ("recurrent_gemma", "3 of 4 layers keep a recurrent state, 1920 B for each sequence"),
        # 4 x 128 in 16 bit and 128 x 16 in fp32 in each layer.
        ("mamba", "4 of 4 layers keep a recurrent state, 36864 B for each sequence"),
    ],
)
def test_recurrent_state_beside_or_without_a_cache_is_named(family: str, state: str) -> None:
    config = {**SHAPE, "model_type": family}
    if family == "mamba":
        for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
            config.pop(name)
    from transformers import MambaForCausalLM

    found = describe(ResolvedModel(name=family, config_dict=config), tier="16bit")
    state = f"{state} in all, which the plan leaves out"
    if family == "mamba" and "cache_params" in signature(MambaForCausalLM.forward).parameters:
        # Older versions hand it a cache of its own kind.
        state = "no layer keeps a KV cache; what the model keeps instead is not planned"
    assert_recurrent(found, state)
    assert found.attention == ("none" if family == "mamba" else "sdpa")


def test_attention_that_cannot_be_run_is_taken_from_the_configuration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from pytest_multigpu.model import kv

    def fail(*_: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(kv, "_measure", fail)
    found = describe(resolved("phi3"), tier="16bit")
    assert found.passes is not None
    assert found.unknown == (
        "the KV cache is taken from the configuration (2 heads of 16), since the attention could "
        "not be run on the meta device (NotImplementedError)",
    )
    assert found.blocks[1].kv_bytes_per_token == 2 * 2 * 16 * 2


@pytest.mark.parametrize(
    ("family", "sparse"),
    [("mixtral", 4), ("qwen3_moe", 2), ("deepseek_v3", 3), ("gpt_oss", 4), ("llama", 0)],
)
def test_experts_that_a_router_chooses_among(family: str, sparse: int) -> None:
    stacked = sum(
        parameter.nbytes
        for name, parameter in real_model(family).named_parameters()
        if ".experts." in name and parameter.ndim == 3
    )
    for tier in TIERS:
        found = describe(resolved(family), tier=tier)
        assert sum(block.routed_bytes for block in found.blocks) == stacked
        shares = [block.routed_share for block in found.blocks if block.routed_bytes]
        assert shares == [2 / 4] * sparse
        others = {block.routed_share for block in found.blocks if not block.routed_bytes}
        assert others == {1.0}


@pytest.mark.parametrize(
    ("chosen", "share"), [({"top_k_experts": 1}, 0.25), ({"num_experts_per_tok": 9}, 1.0)]
)
def test_how_many_experts_a_token_goes_through(chosen: dict[str, int], share: float) -> None:
    """Gemma 4 has a name of its own for it."""
    config: dict[str, Any] = {**SHAPE, "model_type": "mixtral", "num_local_experts": 4}
    if "top_k_experts" in chosen:
        config = {
            **SHAPE,
            "model_type": "gemma4_text",
            "head_dim": 16,
            "global_head_dim": 16,
            "vocab_size_per_layer_input": 128,
            "hidden_size_per_layer_input": 8,
            "enable_moe_block": True,
            "num_experts": 4,
            "moe_intermediate_size": 32,
        }
    found = describe(ResolvedModel(name="m", config_dict={**config, **chosen}), tier="16bit")
    assert {block.routed_share for block in found.blocks if block.kind == "layer"} == {share}
