"""What a device map may place on its own, and what each such block holds: every parameter, in the
form that it has in memory.

torch and transformers are imported inside the functions. May import records and its siblings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from ..records.plan import Block, BlockKind
from .kv import KvLayout
from .meta import MetaModel, decoder_layers
from .sizes import Size, Sizer


def blocks_of(meta: MetaModel, dtype: str, kv: KvLayout) -> tuple[Block, ...]:
    """In forward order, every parameter in one of them.

    :param dtype: of what is not quantised.
    """
    model = meta.model
    blocks = {block.name: block for block in _empty(model, kv)}
    tied = _tied_parameters(model)
    sizer = Sizer(model, dtype)
    chosen = _chosen_experts(meta.config.get_text_config(decoder=True))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        block = blocks[_owner(name, blocks)]
        source = tied.get(name)
        if source is None:
            size = sizer.size(name, parameter)
            block = _with(block, parameter, size, quantises=meta.quantizer is not None)
            experts = _experts(model, name, parameter)
            if experts:
                share = min(1.0, (chosen or experts) / experts)
                routed = block.routed_bytes + size.in_memory
                block = replace(block, routed_bytes=routed, routed_share=share)
        elif _owner(source, blocks) != block.name:
            block = replace(block, tied_to=_owner(source, blocks))
        blocks[block.name] = block
    return tuple(blocks.values())


def _with(block: Block, parameter: Any, size: Size, *, quantises: bool) -> Block:
    """The block and one parameter more."""
    count = int(parameter.numel())
    kept = quantises and not size.transient and block.kind == "layer" and parameter.ndim > 1
    return replace(
        block,
        parameters=block.parameters + count,
        weights_bytes=block.weights_bytes + size.in_memory,
        load_transient_bytes=max(block.load_transient_bytes, size.transient),
        quantised_parameters=block.quantised_parameters + (count if size.transient else 0),
        unquantised_bytes=block.unquantised_bytes + (size.in_memory if kept else 0),
    )


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


def _empty(model: Any, kv: KvLayout) -> Iterator[Block]:
    """What a device map may place on its own, in forward order as the model registers it: modules,
    and loose parameters. Without their weights."""
    no_split = set(model._no_split_modules or ())
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    layers = {id(module): index for index, module in enumerate(decoder_layers(model))}
    whole = {id(module) for module in model.modules() if type(module).__name__ in no_split}
    whole |= {*layers, id(embeddings), id(head)}

    def kind(name: str, module: Any) -> BlockKind:
        if module is head:
            return "head"
        if id(module) in layers:
            return "layer"
        if module is embeddings:
            return "embedding"
        leaf = name.rpartition(".")[2].lower()
        class_name = type(module).__name__.lower()
        if "norm" in class_name or "norm" in leaf:
            return "norm"
        return "embedding" if "embedding" in class_name and "rotary" not in class_name else "other"

    def block(path: str, module: Any) -> Block:
        layer = layers.get(id(module))
        made = Block(name=path, kind=kind(path, module), layer=layer)
        if layer is None:
            return made
        cached = kv.layers[layer]
        return replace(made, kv_bytes_per_token=cached.bytes_per_token, kv_window=cached.window)

    def walk(prefix: str, module: Any) -> Iterator[Block]:
        for name, _ in module.named_parameters(recurse=False):
            yield Block(name=f"{prefix}{name}", kind="other")
        for name, child in module.named_children():
            path = f"{prefix}{name}"
            inner = any(id(sub) in whole for sub in child.modules() if sub is not child)
            if id(child) in whole or not inner:
                if _has_tensors(child):
                    yield block(path, child)
            else:
                yield from walk(f"{path}.", child)

    yield from walk("", model)


def _has_tensors(module: Any) -> bool:
    return any(True for _ in module.parameters()) or any(True for _ in module.buffers())


def _tied_parameters(model: Any) -> dict[str, str]:
    """Parameter name to the name whose tensor it shares."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})
