"""A synthesised Llama's norms are halved: the same model, whose inputs LLM.int8 finds calm."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pytest_multigpu.model import synthetic
from pytest_multigpu.model.half_norms import factors
from pytest_multigpu.model.loading import load_model

LLAMA = (
    *("input_layernorm", "post_attention_layernorm"),
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 512,
}


def weights(modules: Sequence[str], block: str = "model.layers.7") -> list[str]:
    return [f"{block}.{module}.weight" for module in modules]


def test_norms_are_halved_and_what_reads_them_is_doubled() -> None:
    others = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    assert factors([*others, *weights(LLAMA)]) == {
        "model.layers.7.input_layernorm.weight": 0.5,
        "model.layers.7.post_attention_layernorm.weight": 0.5,
        "model.layers.7.self_attn.q_proj.weight": 2.0,
        "model.layers.7.self_attn.k_proj.weight": 2.0,
        "model.layers.7.self_attn.v_proj.weight": 2.0,
        "model.layers.7.mlp.gate_proj.weight": 2.0,
        "model.layers.7.mlp.up_proj.weight": 2.0,
    }


def test_biases_and_norms_of_heads_stay() -> None:
    names = weights((*LLAMA, "self_attn.q_norm", "self_attn.k_norm"))
    names += [f"model.layers.7.self_attn.{name}_proj.bias" for name in "qkv"]
    assert factors(names) == factors(weights(LLAMA))


def test_every_block_is_looked_at_by_itself() -> None:
    plain, odd = weights(LLAMA), weights(LLAMA[1:], "model.layers.8")
    assert factors([*plain, *odd]) == factors(plain)
    assert len(factors([*plain, *weights(LLAMA, "model.layers.8")])) == 14
    assert factors(weights(LLAMA, "layers.0")).keys() <= set(weights(LLAMA, "layers.0"))


@pytest.mark.parametrize(
    "more",
    [
        ("post_feedforward_layernorm",),  # OLMo 2, whose norms come behind
        ("mlp.gate",),  # a router reads the norm too
    ],
)
def test_blocks_that_are_built_otherwise_stay_as_they_are(more: tuple[str, ...]) -> None:
    assert factors(weights((*LLAMA, *more))) == {}


def test_a_norm_that_adds_one_stays() -> None:
    """Gemma's: its weight is 0, and half of it is 0."""
    assert factors(weights(LLAMA), zeros=weights(LLAMA[:1])) == {}
    assert factors(weights(LLAMA), zeros=weights(LLAMA[1:2])) == {}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_it_is_the_same_model_to_the_bit(
    family: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **SHAPE}))
    torch.manual_seed(0)
    tokens = torch.randint(3, 512, (2, 48))

    def logits_and_input() -> tuple[Any, Any]:
        loaded = load_model(
            str(tmp_path), tier="cpu", dtype=dtype, device_map={"": "cpu"}, weights="synthetic"
        )
        seen: list[Any] = []
        gate = loaded.decoder_layers[2].mlp.gate_proj
        gate.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
        with torch.no_grad():
            return loaded.model(tokens).logits, seen[0]

    logits, read = logits_and_input()
    monkeypatch.setattr(synthetic, "factors", lambda *_: {})
    whole_logits, whole_read = logits_and_input()
    assert torch.equal(logits, whole_logits)
    assert torch.equal(read * 2, whole_read)
    assert whole_read.abs().max() > 2


def test_quantised_it_is_the_same_too() -> None:
    """Codes do not change with a factor of two, and statistics by just that."""
    functional = pytest.importorskip("bitsandbytes.functional")
    import torch

    torch.manual_seed(0)
    matrix = torch.randn(64, 512).mul(0.02).to(torch.bfloat16)
    once, twice = (functional.quantize_4bit(m, quant_type="nf4") for m in (matrix, matrix * 2))
    assert torch.equal(once[0], twice[0])
    assert torch.equal(functional.dequantize_4bit(*once) * 2, functional.dequantize_4bit(*twice))
    once, twice = (functional.int8_vectorwise_quant(m.half()) for m in (matrix, matrix * 2))
    assert torch.equal(once[0], twice[0])
    assert torch.equal(once[1] * 2, twice[1])
