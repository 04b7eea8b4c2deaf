"""What a device map may place on its own, and what each such block holds: every parameter, in the
form that it has in memory.

torch and transformers are imported inside the functions. May import records and its siblings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..records.plan import Block, BlockKind
from .kv import KvLayout
from .meta import MetaModel, decoder_layers
from .sizes import Sizer


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


def blocks_of(meta: MetaModel, dtype: str, kv: KvLayout) -> tuple[Block, ...]:
    """In forward order, every parameter in one of them.

    :param dtype: of what is not quantised.
    """
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
