"""The bytes of a causal language model, block by block, exactly as it will be loaded.

Nothing is estimated: the installed transformers builds the model on the meta device, the
installed quantiser says which Linears it replaces, and every parameter is counted in the form
that it has in memory. torch and transformers are imported inside the functions.
May import records, errors and its siblings.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import UsageError
from ..records.passes import Passes
from ..records.plan import Architecture, Block, BlockKind, Tier
from ..units import MIB, human_size
from . import cache
from .config import OPTION, ResolvedModel
from .kv import KvLayout, read_kv_layout
from .meta import (
    DTYPE_BYTES,
    MetaModel,
    build_meta_model,
    decoder_layers,
    new_meta_model,
    one_line,
)
from .passes import AS_LLAMA, passes_of, quantised_in_layers, repeats_kv_to_decode
from .sizes import Sizer

_ALONE = threading.Lock()
"""transformers builds a model under torch's default dtype, which is the whole process's: two
threads at once made a Gemma's quantised weights twice as large, and the disk cache kept that."""


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
            except (AttributeError, TypeError, ValueError, LookupError) as error:
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
    blocks = _blocks(meta, dtype, kv)
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


@dataclass(frozen=True)
class _Part:
    """A module (or a loose parameter) that becomes a block."""

    name: str
    kind: BlockKind
    layer: int | None = None


@dataclass
class _Sums:
    parameters: int = 0
    weights_bytes: int = 0
    load_transient_bytes: int = 0
    quantised_parameters: int = 0
    unquantised_bytes: int = 0
    routed_bytes: int = 0
    routed_share: float = 1.0
    tied_to: str | None = None
    names: list[str] = field(default_factory=list)


def _blocks(meta: MetaModel, dtype: str, kv: KvLayout) -> tuple[Block, ...]:
    model = meta.model
    parts = list(_parts(model))
    tied = _tied_parameters(model)
    sums = {part.name: _Sums() for part in parts}
    layers = {part.name for part in parts if part.kind == "layer"}
    sizer = Sizer(model, dtype)
    chosen = _chosen_experts(meta.config.get_text_config(decoder=True))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = _owner(name, sums)
        entry = sums[owner]
        source = tied.get(name)
        if source is not None:
            source_owner = _owner(source, sums)
            if source_owner != owner:
                entry.tied_to = source_owner
            continue
        size = sizer.size(name, parameter)
        entry.parameters += parameter.numel()
        entry.weights_bytes += size.in_memory
        entry.load_transient_bytes = max(entry.load_transient_bytes, size.transient)
        if size.transient:
            entry.quantised_parameters += parameter.numel()
        elif meta.quantizer is not None and owner in layers and parameter.ndim > 1:
            entry.unquantised_bytes += size.in_memory
        experts = _experts(model, name, parameter)
        if experts:
            entry.routed_bytes += size.in_memory
            entry.routed_share = min(1.0, (chosen or experts) / experts)
    blocks = []
    for part in parts:
        entry = sums[part.name]
        cached = kv.layers[part.layer] if part.layer is not None else None
        blocks.append(
            Block(
                name=part.name,
                kind=part.kind,
                layer=part.layer,
                parameters=entry.parameters,
                weights_bytes=entry.weights_bytes,
                load_transient_bytes=entry.load_transient_bytes,
                quantised_parameters=entry.quantised_parameters,
                unquantised_bytes=entry.unquantised_bytes,
                routed_bytes=entry.routed_bytes,
                routed_share=entry.routed_share,
                kv_bytes_per_token=cached.bytes_per_token if cached else 0,
                kv_window=cached.window if cached else None,
                tied_to=entry.tied_to,
            )
        )
    return tuple(blocks)


def _experts(model: Any, name: str, parameter: Any) -> int:
    """How many experts' matrices the parameter is; 0 if it is something else."""
    module = model.get_submodule(name.rpartition(".")[0])
    experts = getattr(module, "num_experts", None)
    stacked = parameter.ndim == 3 and parameter.shape[0] == experts
    return int(parameter.shape[0]) if stacked else 0


def _chosen_experts(text: Any) -> int | None:
    """How many a token goes through, by the names that transformers' configurations use."""
    found = (getattr(text, key, None) for key in ("num_experts_per_tok", "top_k_experts"))
    return next((value for value in found if isinstance(value, int)), None)


def _owner(name: str, parts: Mapping[str, object]) -> str:
    """The part that a parameter belongs to: the longest prefix, itself included."""
    prefix = name
    while prefix and prefix not in parts:
        prefix = prefix.rpartition(".")[0]
    return prefix


def _parts(model: Any) -> Iterator[_Part]:
    """What a device map may place on its own, in forward order as the model registers it."""
    no_split = set(model._no_split_modules or ())
    embeddings = {id(module) for module in _modules(model, "get_input_embeddings")}
    heads = {id(module) for module in _modules(model, "get_output_embeddings")}
    layer_list = decoder_layers(model)
    layers = {id(module): index for index, module in enumerate(layer_list)}
    whole = {id(module) for module in model.modules() if type(module).__name__ in no_split}
    whole |= set(layers) | embeddings | heads

    def kind(name: str, module: Any) -> BlockKind:
        if id(module) in heads:
            return "head"
        if id(module) in layers:
            return "layer"
        if id(module) in embeddings:
            return "embedding"
        leaf = name.rpartition(".")[2].lower()
        class_name = type(module).__name__.lower()
        if "norm" in class_name or "norm" in leaf:
            return "norm"
        return "embedding" if "embedding" in class_name and "rotary" not in class_name else "other"

    def walk(prefix: str, module: Any) -> Iterator[_Part]:
        for name, _ in module.named_parameters(recurse=False):
            yield _Part(f"{prefix}{name}", "other")
        for name, child in module.named_children():
            path = f"{prefix}{name}"
            inner = any(id(sub) in whole for sub in child.modules() if sub is not child)
            if id(child) in whole or not inner:
                if _has_tensors(child):
                    yield _Part(path, kind(path, child), layers.get(id(child)))
            else:
                yield from walk(f"{path}.", child)

    yield from walk("", model)


def _modules(model: Any, getter: str) -> list[Any]:
    try:
        module = getattr(model, getter)()
    except (NotImplementedError, AttributeError):
        return []
    return [] if module is None else [module]


def _has_tensors(module: Any) -> bool:
    return any(True for _ in module.parameters()) or any(True for _ in module.buffers())


def _tied_parameters(model: Any) -> dict[str, str]:
    """Parameter name to the name whose tensor it shares."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})
