"""A causal language model without its head. Imports nothing."""

from __future__ import annotations

from typing import Any


def decoder_of(model: Any) -> Any:
    """What ``model.get_decoder()`` should give: the module that ends with the last norm.

    Some of transformers' own say otherwise: Llama 4's gives the whole model, ModernBERT's decoder a
    Linear that has that name.
    """
    found = model.get_decoder() if hasattr(model, "get_decoder") else model
    if found is None or found is model or not hasattr(found, "get_input_embeddings"):
        return getattr(model, "model", model)
    return found
