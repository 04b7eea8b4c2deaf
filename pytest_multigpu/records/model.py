"""A loaded model as observed: where it lies, how long it took, what it peaked at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class DevicePlacement:
    """What was found on one device after loading."""

    device: str
    """``cuda:0``, ``cpu``, ``meta`` or ``disk``."""
    parameters: int
    """Logical parameters: a packed 4-bit tensor counts the weights that it stands for."""
    weights_bytes: int
    """Storage of parameters, quantisation statistics and buffers."""
    layers: tuple[int, ...] = ()
    """Decoder layers with any parameter here, ascending."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Observed placement of a whole model."""

    devices: tuple[DevicePlacement, ...]
    device_map: Mapping[str, int | str]
    """Block name to CUDA index, ``cpu``, ``disk`` or ``meta``, from the parameters themselves
    (``hf_device_map`` is absent when one device holds everything)."""

    @property
    def parameters(self) -> int:
        return sum(device.parameters for device in self.devices)


@dataclass(frozen=True, kw_only=True)
class PeakReading:
    """Peak of one phase on one GPU."""

    device: str
    allocated_bytes: int
    """``torch.cuda.max_memory_allocated``."""
    reserved_bytes: int
    """``torch.cuda.max_memory_reserved``."""
    used_bytes: int | None = None
    """Largest NVML ``used`` seen in the phase, contexts included; None if not measured."""


@dataclass(frozen=True, kw_only=True)
class PhasePeaks:
    """Peaks of one phase (``load``, ``prefill``, ``decode``, ``probe``), one reading a GPU."""

    phase: str
    readings: tuple[PeakReading, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """How the weights came onto the devices."""

    weights: Literal["synthetic", "checkpoint"]
    seconds: float
    bytes: int
    """Read from disk or synthesised, before quantisation."""
    loader: str
    """Who moved them: ``transformers`` or ``pytest-multigpu``."""
    peaks: PhasePeaks = field(default_factory=lambda: PhasePeaks(phase="load"))
    notes: tuple[str, ...] = ()
    """Anything a reader should know: a fallback and why."""
