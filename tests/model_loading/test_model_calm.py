"""Synthesised models are calm: a rounding error stays one, in every family and over many layers.

Were they not, a text scored in a batch, or with the cache, would score otherwise on sound GPUs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_multigpu.model.initial import starts_at_zero
from pytest_multigpu.model.loading import load_model

SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 192,  # about as far from a power of four as gpt-oss-20b's 2880
    "intermediate_size": 512,
    "num_hidden_layers": 10,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SHAPE,
    "gemma2": {**SHAPE, "query_pre_attn_scalar": 72, "sliding_window": 64},
    "olmo2": SHAPE,
    "gpt_oss": {
        **SHAPE,
        "intermediate_size": 192,
        "num_experts_per_tok": 4,
        "num_local_experts": 16,
        "sliding_window": 64,
    },
}
TOKENS = 64


@pytest.fixture
def load(tmp_path: Path) -> Callable[[str], Any]:
    def made(family: str) -> Any:
        (tmp_path / "config.json").write_text(
            json.dumps({"model_type": family, **FAMILIES[family]})
        )
        return load_model(str(tmp_path), tier="cpu", device_map={"": "cpu"}, weights="synthetic")

    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_rounding_stays_small(family: str, load: Callable[[str], Any]) -> None:
    import torch

    loaded = load(family)
    torch.manual_seed(0)
    tokens = torch.randint(3, 512, (1, TOKENS))

    def last_hidden() -> Any:
        with torch.no_grad():
            return loaded.model.get_decoder()(tokens).last_hidden_state.float()

    def disturb(_module: Any, _inputs: Any, output: Any) -> Any:
        """By half a bfloat16 step, at every layer."""
        x = output[0] if isinstance(output, tuple) else output
        noisy = x * (1 + 2**-9 * torch.randn_like(x))
        return (noisy, *output[1:]) if isinstance(output, tuple) else noisy

    plain = last_hidden()
    for layer in loaded.decoder_layers:
        layer.register_forward_hook(disturb)
    change = (last_hidden() - plain).norm() / plain.norm()
    # At most 0.027. Scales of up to twice that gave gpt-oss 0.28 and the others 0.054, norms of two
    # where one was meant Gemma 2 0.083, experts as wide as the rest gpt-oss 0.18.
    assert 0.002 < change.item() < 0.05


def test_norms_that_add_one_start_at_zero(load: Callable[[str], Any]) -> None:
    model = load("gemma2").model
    zeros = starts_at_zero(model)
    norms = {name for name, _ in model.named_parameters() if "norm" in name}
    assert zeros == norms != set()
    assert not any(model.get_parameter(name).any() for name in norms)


def test_other_norms_do_not(load: Callable[[str], Any]) -> None:
    model = load("llama").model
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    assert starts_at_zero(model) == frozenset()
    assert all((model.get_parameter(name) == kept).all() for name, kept in before.items())
