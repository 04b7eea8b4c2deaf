"""Where the weights of a loaded model really are, from the parameters themselves.

May import records and siblings; torch in functions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from ..records.model import DevicePlacement, Placement
from .loaded import decoder_layers_named


def observe(model: Any) -> Placement:
    """Observed placement of a ``PreTrainedModel``.

    Parameters shared by two modules are counted once. A 4-bit tensor counts the weights that it
    stands for. Offloaded weights lie on ``meta``; the hook that fetches them says whether they
    wait on ``cpu`` or ``disk``.
    """
    layers_name, layers = decoder_layers_named(model)
    layer_of = {f"{layers_name}.{index}": index for index in range(len(layers))}
    parameters: dict[str, int] = {}
    size: dict[str, int] = {}
    in_layers: dict[str, set[int]] = {}
    blocks: dict[str, set[str]] = {}
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        for name, tensor, is_parameter in _own_tensors(module):
            where = _device_of(module, name, tensor)
            block = _block_of(module_name, layers_name)
            loose = block not in layer_of and module._modules
            # No device map has a place for a loose buffer, such as GPT-BigCode's mask.
            if is_parameter or not loose:
                own = f"{block}.{name}".lstrip(".") if loose else block
                blocks.setdefault(own, set()).add(where)
            if is_parameter and block in layer_of:
                in_layers.setdefault(where, set()).add(layer_of[block])
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            size[where] = size.get(where, 0) + _storage_bytes(module, name, tensor)
            count = _logical_count(tensor) if is_parameter else 0
            parameters[where] = parameters.get(where, 0) + count
    return Placement(
        devices=tuple(
            DevicePlacement(
                device=device,
                parameters=parameters[device],
                weights_bytes=size[device],
                layers=tuple(sorted(in_layers.get(device, ()))),
            )
            for device in sorted(size, key=_device_order)
        ),
        device_map={name: _map_value(where) for name, where in _device_map(model, blocks)},
    )


def _own_tensors(module: Any) -> Iterator[tuple[str, Any, bool]]:
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield name, parameter, True
    for name, buffer in module._buffers.items():
        if buffer is not None:
            yield name, buffer, False


def _device_of(module: Any, name: str, tensor: Any) -> str:
    if tensor.device.type != "meta":
        return str(tensor.device)
    return _offloaded_to(module, name)


def _offloaded_to(module: Any, name: str) -> str:
    """Where accelerate keeps a tensor that it moves to the GPU for each forward pass."""
    hook = getattr(module, "_hf_hook", None)
    for part in getattr(hook, "hooks", None) or (hook,):
        weights = getattr(part, "weights_map", None)
        if weights is None:
            continue
        # PrefixedDataset over OffloadedWeightsLoader, or over a plain dict.
        prefix = getattr(weights, "prefix", "")
        inner = getattr(weights, "dataset", weights)
        held = getattr(inner, "state_dict", inner)
        if f"{prefix}{name}" in held:
            return "cpu"
        if f"{prefix}{name}" in (getattr(inner, "index", None) or {}):
            return "disk"
    return "meta"


def _block_of(module_name: str, layers_name: str) -> str:
    """The part of a device map that a module belongs to: its decoder layer, or itself."""
    prefix = f"{layers_name}."
    if module_name.startswith(prefix):
        return prefix + module_name[len(prefix) :].split(".", 1)[0]
    return module_name


def _device_map(model: Any, blocks: dict[str, set[str]]) -> Iterator[tuple[str, str]]:
    """One entry a block; a block that is split over devices gets one per module."""
    for block, places in blocks.items():
        if len(places) == 1:
            yield block, next(iter(places))
            continue
        # A loose tensor has one place, so this block is a module.
        for name, module in model.get_submodule(block).named_modules():
            inner = {_device_of(module, key, tensor) for key, tensor, _ in _own_tensors(module)}
            path = f"{block}.{name}" if name else block
            if len(inner) == 1:
                yield path, next(iter(inner))
            else:
                for key, tensor, _ in _own_tensors(module):
                    yield f"{path}.{key}", _device_of(module, key, tensor)


def _map_value(where: str) -> int | str:
    kind, _, index = where.partition(":")
    return int(index) if kind == "cuda" else kind


def _device_order(device: str) -> tuple[int, int]:
    kind, _, index = device.partition(":")
    order = {"cuda": 0, "cpu": 1, "disk": 2}
    return order.get(kind, 3), int(index or 0)


def _logical_count(tensor: Any) -> int:
    state = getattr(tensor, "quant_state", None)
    shape = getattr(state, "shape", None)
    return math.prod(shape) if shape is not None else int(tensor.numel())


def _storage_bytes(module: Any, name: str, tensor: Any) -> int:
    """Bytes of a tensor and of the statistics that bitsandbytes keeps beside it."""
    total = int(tensor.numel()) * int(tensor.element_size())
    if name != "weight":
        return total
    state = getattr(tensor, "quant_state", None)
    if state is not None:
        nested = getattr(state, "state2", None)
        extra = [state.absmax, state.code, getattr(state, "offset", None)]
        if nested is not None:
            extra += [nested.absmax, nested.code]
        return total + sum(_bytes(item) for item in extra if item is not None)
    # int8: SCB moves from the parameter to the module's state at the first forward pass.
    scales = getattr(tensor, "SCB", None)
    if scales is None:
        scales = getattr(getattr(module, "state", None), "SCB", None)
    return total + (_bytes(scales) if scales is not None else 0)


def _bytes(tensor: Any) -> int:
    return int(tensor.numel()) * int(tensor.element_size())
