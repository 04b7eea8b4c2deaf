"""A tiny float32 Llama with weights that move its residual stream, and the built-in tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pytest_multigpu.probes.observe import Observed, observe
from pytest_multigpu.probes.probe import Probe
from pytest_multigpu.probes.synthetic import synthetic_probe

HIDDEN, LAYERS = 64, 6


def tiny_llama(seed: int = 0, dtype: str = "float32") -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    # Threads cost more than such small matrices take, the more so beside other work.
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=272,
        max_position_embeddings=512,
        initializer_range=0.3,
        bos_token_id=256,
        eos_token_id=260,
    )
    model = LlamaForCausalLM(config).eval().to(getattr(torch, dtype))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    # A norm's weight of ones would hide a norm whose weight is left out.
    model.model.norm.weight.copy_(torch.rand(HIDDEN) + 0.5)
    return model


@pytest.fixture(scope="session")
def model() -> Any:
    return tiny_llama()


@pytest.fixture
def make_llama() -> Callable[..., Any]:
    return tiny_llama


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from pytest_multigpu.model.tokenizer import built_in_tokenizer

    return built_in_tokenizer()


@pytest.fixture(scope="session")
def observed(model: Any, tokenizer: Any) -> Observed:
    return observe(model, tokenizer)


@pytest.fixture(scope="session")
def probe() -> Probe:
    return synthetic_probe(HIDDEN, LAYERS, layers=(3,))
