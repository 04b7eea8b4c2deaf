"""What ``device_map="auto"`` does with a model on a machine, and how it is brought to do better.

Glue between the adapter that runs transformers' own planner and pure planning. Knows no pytest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import LoadError
from .records.machine import Machine
from .records.plan import Architecture, DeviceMap, MaxMemory
from .units import GIB

if TYPE_CHECKING:
    from .model.config import ResolvedModel
    from .records.automap import AutoMap, Planner

_CPU_BYTES = 1 << 50
"""Host memory given to auto at first: while what goes there fits, the map does not depend on it,
and the cached plan of an earlier run stays good whatever is free today."""


def auto_map(resolved: ResolvedModel, architecture: Architecture, machine: Machine) -> AutoMap:
    """The map of plain auto on this machine, and why it would refuse.

    :raises LoadError: the installed transformers has no planner.
    """
    auto = _auto_map(resolved, architecture, machine, _CPU_BYTES)
    if auto.offloaded and machine.simulated is None:
        host_bytes = _available_host_bytes()
        if _on_host_bytes(architecture, auto.device_map) > host_bytes:
            # Only now does it matter how much the host has: what goes to cpu, what to disk.
            auto = _auto_map(resolved, architecture, machine, host_bytes // GIB * GIB)
    return auto


def max_memory(
    resolved: ResolvedModel, architecture: Architecture, target: DeviceMap
) -> MaxMemory | None:
    """With which auto gives ``target``; None if there is none or no planner to ask."""
    from .model.automap import search_max_memory
    from .planning.max_memory import max_memory_for_auto

    def search(planner: Planner) -> MaxMemory | None:
        return max_memory_for_auto(architecture, target, planner)

    try:
        return search_max_memory(
            resolved,
            tier=architecture.tier,
            dtype=architecture.dtype,
            target=target,
            search=search,
        )
    except LoadError:  # bitsandbytes does not import here: a plan is made all the same
        return None


def _auto_map(
    resolved: ResolvedModel, architecture: Architecture, machine: Machine, cpu_bytes: int
) -> AutoMap:
    from .model.automap import auto_device_map
    from .planning.costs import costs_for

    free = {
        position: max(0, gpu.free_bytes - costs_for(gpu.capability).context_bytes)
        for position, gpu in enumerate(machine.visible_gpus)
    }
    return auto_device_map(
        resolved,
        tier=architecture.tier,
        dtype=architecture.dtype,
        free_bytes=free,
        cpu_bytes=cpu_bytes,
    )


def _available_host_bytes() -> int:
    """What psutil, and so transformers, takes for available."""
    import psutil

    return int(psutil.virtual_memory().available)


def _on_host_bytes(architecture: Architecture, device_map: DeviceMap) -> int:
    """Bytes of the blocks that a map puts on the CPU."""
    from .planning.device_maps import expand

    placed = expand(architecture, device_map)
    return sum(block.weights_bytes for block in architecture.blocks if placed[block.name] == "cpu")
