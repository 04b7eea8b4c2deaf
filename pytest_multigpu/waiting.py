"""Is memory held that others may let go of, and would that be enough? Knows no pytest."""

from __future__ import annotations

from collections.abc import Sequence

from .judging.vram import HELD_LIMIT
from .records.machine import Machine
from .requirements import GpuRequirement, unmet


def held(machine: Machine) -> bool:
    """Somebody holds memory on a GPU that CUDA sees."""
    return any(gpu.used_bytes > HELD_LIMIT for gpu in machine.visible_gpus)


def would_help(needs: Sequence[GpuRequirement], machine: Machine) -> bool:
    """A need is not met, and would be once everybody had let go of the GPUs."""
    emptied = machine.idle()
    return any(unmet(need, machine) and not unmet(need, emptied) for need in needs)
