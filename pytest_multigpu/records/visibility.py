"""Which GPUs CUDA sees and why, and what the environment says about them.

Imports only the standard library.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Form = Literal["unset", "empty", "indices", "uuids", "mig"]


@dataclass(frozen=True, kw_only=True)
class Visibility:
    """CUDA_VISIBLE_DEVICES, read as the CUDA runtime reads it."""

    value: str | None
    """As found; None if unset."""
    form: Form
    visible: tuple[int, ...]
    """NVML indices in CUDA order."""
    faults: tuple[str, ...] = ()
    """Why CUDA does not give what the value asks for, a sentence each, naming the entry."""
    notes: tuple[str, ...] = ()
    """Oddities that change nothing, a sentence each."""
    mend: str = ""
    """The command that gives what the value plainly means; empty without faults and notes."""
    certain_order: bool = True
    """False when mixed cards are ordered by speed, which only CUDA itself can tell."""


@dataclass(frozen=True, kw_only=True)
class GpuEnvironment:
    """What the environment says about the GPUs. None: not set."""

    cuda_visible_devices: str | None = None
    cuda_device_order: str | None = None
    nvidia_visible_devices: str | None = None
    runpod_gpu_count: str | None = None
    cuda_launch_blocking: str | None = None
    cuda_module_loading: str | None = None
    device_files: int | None = None
    """Number of ``/dev/nvidia<N>`` files."""
