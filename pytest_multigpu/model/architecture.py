"""A causal language model as the plan knows it: its blocks, shapes, cache and passes.

Nothing is estimated: the installed transformers builds the model on the meta device, the
installed quantiser says which Linears it replaces, and every parameter is counted in the form
that it has in memory (:mod:`.blocks`). torch and transformers are imported inside the functions.
May import records, errors and its siblings.
"""

from __future__ import annotations

import json
import threading
from typing import Any

from ..errors import UsageError
from ..records.passes import Passes
from ..records.plan import Architecture, Tier
from ..units import MIB, human_size
from . import cache
from .blocks import blocks_of
from .config import OPTION, ResolvedModel
from .kv import read_kv_layout
from .meta import (
    DTYPE_BYTES,
    MetaModel,
    build_meta_model,
    new_meta_model,
    one_line,
)
from .passes import AS_LLAMA, passes_of, quantised_in_layers, repeats_kv_to_decode

_ALONE = threading.Lock()
"""transformers builds a model under torch's default dtype, which is the whole process's: two
threads at once made a Gemma's quantised weights twice as large, and the disk cache kept that."""
_UNLIKE = (AttributeError, TypeError, ValueError, LookupError, NotImplementedError)
"""What a model that is too unlike the others raises where it is asked for its parts."""


def describe(
    resolved: ResolvedModel,
    *,
    tier: Tier,
    dtype: str = "bfloat16",
    double_quant: bool = False,
    use_cache: bool = True,
) -> Architecture:
    """The blocks of ``resolved`` in ``tier``, from the disk cache if it is there.

    :param dtype: of what is not quantised, and of the KV cache.
    :param double_quant: 4 bit only: quantise the absmax statistics as well.
    :raises UsageError: transformers cannot build a causal language model from the configuration,
        or one that is too unlike the others.
    """

    def compute() -> Architecture:
        with _ALONE:
            meta = build_meta_model(resolved, tier=tier, dtype=dtype, double_quant=double_quant)
            try:
                return _describe(resolved, meta, tier=tier, dtype=dtype)
            except _UNLIKE as error:
                raise UsageError(
                    f"{OPTION}: {resolved.name!r} is a {type(meta.model).__name__}, whose memory "
                    f"cannot be planned: {one_line(error)}; choose a language model of plain "
                    "decoder layers"
                ) from error

    if not use_cache:
        return compute()
    return cache.architecture(
        resolved.name,
        {
            "config": dict(resolved.config_dict),
            "tier": tier,
            "dtype": dtype,
            "double_quant": double_quant,
        },
        compute,
    )


def _describe(resolved: ResolvedModel, meta: MetaModel, *, tier: Tier, dtype: str) -> Architecture:
    model = meta.model
    text = meta.config.get_text_config(decoder=True)
    kv = read_kv_layout(
        model,
        meta.config,
        DTYPE_BYTES[dtype],
        lambda: new_meta_model(resolved, tier="16bit", dtype=dtype).model,
    )
    context = _optional_int(getattr(text, "max_position_embeddings", None))
    attention = str(getattr(text, "_attn_implementation", None) or "eager")
    windowed = any(layer.window for layer in kv.layers)
    passes: Passes | None = None
    unrecorded: tuple[str, ...] = ()
    if type(model).__name__ not in AS_LLAMA or attention != "sdpa" or windowed:
        passes, unrecorded = passes_of(
            json.dumps([dict(resolved.config_dict), dtype], sort_keys=True, default=str),
            lambda: new_meta_model(resolved, tier="16bit", dtype=dtype).model,
            quantised=quantised_in_layers(model),
            caches=kv.layers,
            max_context=context,
        )
    unknown = [*kv.unknown, *unrecorded]
    refused = []
    if tier == "8bit" and passes is not None:
        unknown += _outliers(passes)
        refused += _too_deep(passes, type(model).__name__)
    if "quantization_config" in resolved.config_dict:
        unknown.append(
            "the checkpoint is quantised already; the plan counts it as quantised by bitsandbytes "
            "while loading, or in 16 bit"
        )
    buffer_bytes = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    if buffer_bytes > 16 * MIB:
        unknown.append(
            f"the model has {human_size(buffer_bytes)} of buffers, which the plan leaves out"
        )
    blocks = blocks_of(meta, dtype, kv)
    hidden = int(text.hidden_size)
    # Attention-free models have no such key; their KV cache is reported as unknown above.
    heads = int(getattr(text, "num_attention_heads", None) or 1)
    return Architecture(
        model=resolved.name,
        model_class=type(model).__name__,
        tier=tier,
        dtype=dtype,
        blocks=blocks,
        hidden_size=hidden,
        intermediate_size=_intermediate_size(text, hidden),
        layers=sum(block.kind == "layer" for block in blocks),
        heads=heads,
        kv_heads=kv.heads or int(getattr(text, "num_key_value_heads", None) or heads),
        head_dim=_head_dim(text, hidden, heads),
        vocab_size=int(text.vocab_size),
        max_context=_max_context(text, context),
        attention=attention if kv.heads else "none",
        repeats_kv_to_decode=repeats_kv_to_decode(),
        passes=passes,
        unknown=tuple(unknown),
        refused=tuple(refused),
    )


def _outliers(passes: Passes) -> list[str]:
    """LLM.int8 multiplies a column of the input in 16 bit where one of its values exceeds 6, and
    makes 16-bit copies of it and of its weights (``Linear8bitLt``'s ``threshold``). Measured on two
    H200s: an OLMo 2 32B, nearly all of whose columns are such, peaked at 22.4 GiB of 15.1."""
    if not passes.bare_inputs:
        return []
    return [
        f"{', '.join(passes.bare_inputs)} take what the layer before gives, without a norm of "
        "their own: how many of its columns LLM.int8 multiplies in 16 bit hangs on the weights, "
        "and is counted as Llama's; an OLMo 2 32B took 7 GiB more"
    ]


def _too_deep(passes: Passes, model_class: str) -> list[str]:
    """``bitsandbytes::int8_linear_matmul`` takes no more (``backends/cuda/ops.py``)."""
    if not passes.deep_inputs:
        return []
    return [
        "LLM.int8 takes inputs of two or three dimensions; "
        f"{model_class} gives {', '.join(passes.deep_inputs)} four"
    ]


def _head_dim(text: Any, hidden: int, heads: int) -> int:
    """Width of one query head; latent attention (DeepSeek) gives it in two parts."""
    nope, rope = (getattr(text, f"qk_{part}_head_dim", None) for part in ("nope", "rope"))
    if nope is not None and rope is not None:
        return int(nope) + int(rope)
    return int(getattr(text, "head_dim", None) or hidden // heads)


def _optional_int(value: Any) -> int | None:
    return int(value) if isinstance(value, int) else None


def _max_context(text: Any, positions: int | None) -> int | None:
    """``max_position_embeddings``, or what YaRN makes of it: a model that is switched to that
    keeps its old ``max_position_embeddings``."""
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None)
    if positions is None or not isinstance(rope, dict):
        return positions
    factor, before = rope.get("factor"), rope.get("original_max_position_embeddings")
    if rope.get("rope_type", rope.get("type")) != "yarn" or not isinstance(factor, (int, float)):
        return positions
    return max(positions, int((_optional_int(before) or positions) * factor))


def _intermediate_size(text: Any, hidden: int) -> int:
    """Width of the feed-forward part; the names that transformers' configurations use."""
    for name in ("intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner", "d_ff"):
        value = getattr(text, name, None)
        if isinstance(value, int):
            return value
        if isinstance(value, (list, tuple)) and value:
            return max(int(item) for item in value)
    return 4 * hidden  # GPT-2, Bloom and Falcon: the width that they default to
