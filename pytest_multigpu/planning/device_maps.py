"""Device maps: written by people, by transformers or by the planner; checked before anything loads.

Imports errors and records.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import UsageError, shown
from ..records.machine import Machine
from ..records.plan import Architecture, DeviceMap

OFFLOAD = ("cpu", "disk")


def device_of(name: str, device_map: DeviceMap) -> int | str | None:
    """Where a block goes: by the longest key that names it or a module around it; else None."""
    while True:
        if name in device_map:
            return device_map[name]
        if not name:
            return None
        name = name.rpartition(".")[0]


def expand(architecture: Architecture, device_map: DeviceMap) -> dict[str, int | str]:
    """The map with exactly one key for each block, in forward order.

    A key inside a block (``model.layers.3.mlp``) splits it; the block then counts as where its
    first part is, and :func:`split_blocks` names it.

    :raises UsageError: a block that no key covers.
    """
    expanded: dict[str, int | str] = {}
    for block in architecture.blocks:
        device = device_of(block.name, device_map)
        if device is None:
            inside = [key for key in device_map if key.startswith(f"{block.name}.")]
            if not inside:
                raise UsageError(f"device_map: nothing says where {block.name} goes; add it")
            device = device_map[inside[0]]
        expanded[block.name] = device
    return expanded


def split_blocks(architecture: Architecture, device_map: DeviceMap) -> tuple[str, ...]:
    """Blocks whose parts the map puts on different devices."""
    found = []
    for block in architecture.blocks:
        parts = {device_map[key] for key in device_map if key.startswith(f"{block.name}.")}
        whole = device_of(block.name, device_map)
        if len(parts | ({whole} if whole is not None else set())) > 1:
            found.append(block.name)
    return tuple(found)


def parse_device_map(
    loaded: object, *, source: str, architecture: Architecture, machine: Machine
) -> dict[str, int | str]:
    """The device map of a file, checked against the model and the machine, a key for each block.

    :param loaded: what ``json.load`` made of the file: ``{"model.layers.0": 0, "lm_head": "cpu"}``.
        ``cuda:1`` and ``"1"`` are read as 1; keys may name a module around several blocks, ``""``
        the whole model. Keys starting with ``_comment`` are left alone.
    :param source: the file's name, for errors.
    :raises UsageError: naming the file and the key.
    """
    if not isinstance(loaded, Mapping) or not loaded:
        raise UsageError(
            f"{source}: a device map is a JSON object from module names to GPUs; "
            'write {"": 0} or {"model.layers.0": 0, ...}'
        )
    names = [block.name for block in architecture.blocks]
    count = len(machine.visible)
    checked: dict[str, int | str] = {}
    for key, value in loaded.items():
        if str(key).startswith("_comment"):
            continue
        checked[str(key)] = _device(value, str(key), source, count)
        if not _names_something(str(key), names):
            raise UsageError(
                f"{source}: {key} is no module of {architecture.model}; its modules: "
                f"{', '.join(names[:2])} to {names[-1]}"
            )
    for name in names:
        inside = any(key.startswith(f"{name}.") for key in checked)
        if device_of(name, checked) is None and not inside:
            raise UsageError(
                f"{source}: nothing says where {name} goes; add it, or a module around it"
            )
    torn = split_blocks(architecture, checked)
    if torn:
        raise UsageError(
            f"{source}: {torn[0]} is split over several devices; put it on one, as its residual "
            "connection needs"
        )
    return expand(architecture, checked)


def _names_something(key: str, names: list[str]) -> bool:
    if not key:
        return True
    return any(
        name == key or name.startswith(f"{key}.") or key.startswith(f"{name}.") for name in names
    )


def _device(value: object, key: str, source: str, count: int) -> int | str:
    if isinstance(value, str):
        if value in OFFLOAD:
            return value
        number = value.removeprefix("cuda:")
        if number.isascii() and number.isdigit() and len(number) < 5:
            value = int(number)
    if isinstance(value, bool) or not isinstance(value, int):
        raise UsageError(
            f'{source}: {key} is on {shown(value)}; write a GPU\'s number, "cpu" or "disk"'
        )
    if not 0 <= value < count:
        seen = "CUDA sees no GPU" if not count else f"CUDA sees {_range(count)}"
        raise UsageError(
            f"{source}: {key} is on GPU {shown(value)}, but {seen}; edit the file or rent another "
            "machine"
        )
    return value


def _range(count: int) -> str:
    return "GPU 0" if count == 1 else f"GPUs 0 to {count - 1}"
