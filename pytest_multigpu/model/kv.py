"""The KV cache of each layer: bytes per token and window, as the installed transformers keeps it.

May import nothing of the package but errors and records; torch and transformers inside functions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class LayerKv:
    """One decoder layer's cache, for one sequence."""

    bytes_per_token: int = 0
    window: int | None = None
    """Tokens it keeps at most; None if it grows with the context."""


@dataclass(frozen=True, kw_only=True)
class KvLayout:
    """Caches by decoder layer."""

    layers: tuple[LayerKv, ...]
    heads: int | None = None
    """KV heads of the first layer that caches any."""
    unknown: tuple[str, ...] = field(default=())


def read_kv_layout(model: Any, config: Any, dtype: str) -> KvLayout:
    """What ``DynamicCache(config=...)``, which ``generate`` uses, holds for each layer."""
    import torch

    from .architecture import _decoder_layers

    itemsize = getattr(torch, dtype).itemsize
    text = config.get_text_config(decoder=True)
    modules = _decoder_layers(model)
    heads = int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
    head_dim = int(
        getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    )
    return KvLayout(
        layers=tuple(
            LayerKv(bytes_per_token=2 * heads * head_dim * itemsize) for _ in modules
        ),
        heads=heads,
    )
