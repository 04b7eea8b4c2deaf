"""A hand-made Llama, byte for byte as FACTS of the real one say, without transformers."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pytest_multigpu.planning import peaks
from pytest_multigpu.records.plan import Architecture, Block, Tier


@pytest.fixture(autouse=True)
def nothing_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    """The arithmetic is tested to the last byte; what is kept spare has tests of its own."""
    monkeypatch.setattr(peaks, "SPARE_SHARE", 0)


def llama(
    tier: Tier = "16bit",
    *,
    layers: int = 80,
    hidden: int = 8192,
    intermediate: int = 28672,
    heads: int = 64,
    kv_heads: int = 8,
    head_dim: int = 128,
    vocab: int = 128256,
    size: int = 2,
) -> Architecture:
    """Weights of a layer: q, k, v, o, gate, up, down and two norms.

    8 bit: 1 byte a weight and SCB, fp32 for each output row. 4 bit (nf4): half a byte a weight
    absmax, fp32 for each 64 weights, and a table of 16 fp32 values for each Linear.
    """
    query, kv = heads * head_dim, kv_heads * head_dim
    linears = [
        (query, hidden),
        (kv, hidden),
        (kv, hidden),
        (hidden, query),
        (intermediate, hidden),
        (intermediate, hidden),
        (hidden, intermediate),
    ]
    weights = sum(rows * columns for rows, columns in linears)
    largest = max(rows * columns for rows, columns in linears)
    if tier == "8bit":
        layer_bytes = weights + 4 * sum(rows for rows, _ in linears)
    elif tier == "4bit":
        layer_bytes = weights // 2 + weights // 64 * 4 + 64 * len(linears)
    else:
        layer_bytes = weights * size
    table = vocab * hidden
    blocks = [
        Block(
            name="model.embed_tokens",
            kind="embedding",
            parameters=table,
            weights_bytes=table * size,
        ),
        *(
            Block(
                name=f"model.layers.{i}",
                kind="layer",
                layer=i,
                parameters=weights + 2 * hidden,
                weights_bytes=layer_bytes + 2 * hidden * size,
                load_transient_bytes=0 if tier in ("16bit", "cpu") else largest * size,
                quantised_parameters=0 if tier in ("16bit", "cpu") else weights,
                kv_bytes_per_token=2 * kv * size,
            )
            for i in range(layers)
        ),
        Block(name="model.norm", kind="norm", parameters=hidden, weights_bytes=hidden * size),
        Block(name="lm_head", kind="head", parameters=table, weights_bytes=table * size),
    ]
    return Architecture(
        model="llama-3.3-70b" if layers == 80 else "a small Llama",
        model_class="LlamaForCausalLM",
        tier=tier,
        dtype="bfloat16" if size == 2 else "float32",
        blocks=tuple(blocks),
        hidden_size=hidden,
        intermediate_size=intermediate,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab,
        max_context=131072,
    )


@pytest.fixture(scope="session")
def make_llama() -> Callable[..., Architecture]:
    return llama
