"""The KV cache of each decoder layer: bytes per token and window, as transformers keeps it.

``DynamicCache(config=...)``, which ``generate`` uses, says which layers have a window. The bytes
come from the key and value projections where a layer has plain ones; any other attention (fused
projections, latent attention, shared caches) is run for three tokens on the meta device and its
cache is measured. torch and transformers are imported inside the functions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..units import human_size
from .meta import decoder_layers

_TOKENS = 3


@dataclass(frozen=True, kw_only=True)
class LayerKv:
    """One decoder layer's cache, for one sequence."""

    bytes_per_token: int = 0
    window: int | None = None
    """Tokens it keeps at most; None if it grows with the context."""
    heads: int = 0


@dataclass(frozen=True, kw_only=True)
class KvLayout:
    """Caches by decoder layer."""

    layers: tuple[LayerKv, ...]
    unknown: tuple[str, ...] = ()

    @property
    def heads(self) -> int:
        """KV heads of the layers that cache any; 0 if none does."""
        return max((layer.heads for layer in self.layers), default=0)


def read_kv_layout(
    model: Any, config: Any, itemsize: int, unquantised: Callable[[], Any]
) -> KvLayout:
    """The caches of ``model``'s decoder layers.

    :param itemsize: bytes of one cached number: the model's dtype.
    :param unquantised: builds the same model on the meta device in 16 bit, to be run.
    """
    from transformers import DynamicCache

    layers = decoder_layers(model)
    cache = DynamicCache(config=config)
    plain = _from_projections(layers, cache.layers, config, itemsize)
    if plain is not None:
        return KvLayout(layers=plain)
    try:
        measured = _measure(unquantised(), cache)
    except Exception as error:  # any operation that the meta device lacks
        return _from_config(layers, cache.layers, config, itemsize, error)
    return _layout(measured.layers, len(layers), itemsize)


def _windows(cache_layers: Sequence[Any], count: int) -> list[int | None]:
    found = [
        int(layer.sliding_window) if getattr(layer, "is_sliding", False) else None
        for layer in cache_layers
    ]
    return (found + [None] * count)[:count]


def _shape(config: Any) -> tuple[int, int]:
    """KV heads and head_dim by the configuration's usual names."""
    text = config.get_text_config(decoder=True)
    query_heads = int(getattr(text, "num_attention_heads", None) or 1)
    heads = int(getattr(text, "num_key_value_heads", None) or query_heads)
    return heads, int(getattr(text, "head_dim", None) or text.hidden_size // query_heads)


def _from_projections(
    layers: Sequence[Any], cache_layers: Sequence[Any], config: Any, itemsize: int
) -> tuple[LayerKv, ...] | None:
    """What plain k_proj and v_proj produce; None unless every layer is like that."""
    if len(cache_layers) != len(layers):
        return None
    names = {type(layer).__name__ for layer in cache_layers}
    if not names <= {"DynamicLayer", "DynamicSlidingWindowLayer"}:
        return None
    heads, head_dim = _shape(config)
    windows = _windows(cache_layers, len(layers))
    found = []
    for layer, window in zip(layers, windows, strict=True):
        owners = [
            module
            for module in layer.modules()
            if hasattr(module, "k_proj") and hasattr(module, "v_proj")
        ]
        if len(owners) != 1:
            return None
        widths = [
            getattr(getattr(owners[0], name), "out_features", 0) for name in ("k_proj", "v_proj")
        ]
        if widths != [heads * head_dim] * 2:
            return None
        found.append(LayerKv(bytes_per_token=sum(widths) * itemsize, window=window, heads=heads))
    return tuple(found)


def _measure(model: Any, cache: Any) -> Any:
    """Run three tokens through the meta model; the cache then holds their shapes."""
    import torch

    if hasattr(model, "set_experts_implementation"):
        # The default looks at the routing's values, which meta tensors do not have.
        model.set_experts_implementation("batched_mm")
    model.eval()
    tokens = torch.zeros(1, _TOKENS, dtype=torch.long, device="meta")
    with torch.inference_mode():
        model(input_ids=tokens, use_cache=True, **{cache_name(model): cache})
    return cache


def cache_name(model: Any) -> str:
    """The cache's name in a model's arguments and output: ``cache`` in newer transformers, which
    warn of the older ``past_key_values``."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _layout(cache_layers: Sequence[Any], count: int, itemsize: int) -> KvLayout:
    found = []
    state_layers, state_bytes = 0, 0
    for layer, window in zip(cache_layers[:count], _windows(cache_layers, count), strict=False):
        numbers, heads = 0, 0
        for name in ("keys", "values", "indexer_keys"):
            tensor = getattr(layer, name, None)
            if tensor is not None:
                numbers += int(tensor.numel())
                heads = heads or (int(tensor.shape[1]) if tensor.dim() == 4 else 0)
        states = _state_bytes(layer)
        state_layers += states > 0
        state_bytes += states
        found.append(
            LayerKv(bytes_per_token=numbers * itemsize // _TOKENS, window=window, heads=heads)
        )
    found += [LayerKv()] * (count - len(found))
    unknown: list[str] = []
    if state_layers:
        unknown.append(
            f"{state_layers} of {count} layers keep a recurrent state, "
            f"{human_size(state_bytes)} for each sequence in all, which the plan leaves out"
        )
    elif not any(layer.bytes_per_token for layer in found):
        unknown.append("no layer keeps a KV cache; what the model keeps instead is not planned")
    return KvLayout(layers=tuple(found), unknown=tuple(unknown))


def _state_bytes(layer: Any) -> int:
    total = 0
    for name in ("conv_states", "recurrent_states"):
        states = getattr(layer, name, None)
        for state in states.values() if isinstance(states, dict) else [states]:
            if state is not None and hasattr(state, "numel"):
                total += int(state.numel()) * int(state.element_size())
    return total


def _from_config(
    layers: Sequence[Any],
    cache_layers: Sequence[Any],
    config: Any,
    itemsize: int,
    error: Exception,
) -> KvLayout:
    heads, head_dim = _shape(config)
    every = LayerKv(bytes_per_token=2 * heads * head_dim * itemsize, heads=heads)
    return KvLayout(
        layers=tuple(
            replace(every, window=window) for window in _windows(cache_layers, len(layers))
        ),
        unknown=(
            f"the KV cache is taken from the configuration ({heads} heads of {head_dim}), since "
            f"the attention could not be run on the meta device ({type(error).__name__})",
        ),
    )
