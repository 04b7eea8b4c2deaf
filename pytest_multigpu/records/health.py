"""What NVML says about one GPU's health. None is "unknown", never "fine".

Imports only the standard library.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class GpuHealth:
    """One GPU, over one reading or several (``samples``). Every None is unknown."""

    index: int
    """NVML index."""
    name: str = ""
    ecc_volatile: int | None = None
    """Uncorrected ECC errors since the driver was loaded."""
    ecc_aggregate: int | None = None
    """Uncorrected ECC errors of the card's life."""
    ecc: Literal["on", "off", "none"] | None = None
    """``none``: this card has no ECC to switch on. Without it errors are not counted: unknown."""
    remap_pending: bool | None = None
    """A memory row waits for a GPU reset to be replaced."""
    remap_failed: bool | None = None
    throttle: int | None = None
    """NVML clocks event reasons, a bit mask; OR of all samples."""
    temperature_c: int | None = None
    """Hottest of the samples."""
    slowdown_c: int | None = None
    """Where the hardware starts to slow down."""
    sm_mhz: int | None = None
    """Highest of the samples."""
    sm_max_mhz: int | None = None
    memory_mhz: int | None = None
    memory_max_mhz: int | None = None
    pcie_generation: int | None = None
    """Highest of the samples: it drops while the card idles."""
    pcie_generation_max: int | None = None
    pcie_width: int | None = None
    pcie_width_max: int | None = None
    nvlinks_active: int | None = None
    nvlinks_inactive: int | None = None
    """Links the card has that are not up; both are 0 on a card without NVLink."""
    mig: bool | None = None
    power_w: float | None = None
    """Highest of the samples."""
    power_limit_w: float | None = None
    samples: int = 1
    busy_samples: int = 0
    """Samples in which the GPU was not idle."""
    problem: str | None = None
    """Why this GPU could not be asked."""


@dataclass(frozen=True, kw_only=True)
class Holder:
    """A process that holds memory of a GPU."""

    gpu: int
    """NVML index."""
    pid: int
    used_bytes: int | None = None
    name: str | None = None
    user: str | None = None


@dataclass(frozen=True, kw_only=True)
class FreeMemory:
    """Memory of one GPU at one moment, with who holds it as far as can be seen."""

    gpu: int
    """NVML index."""
    total_bytes: int
    free_bytes: int
    used_bytes: int
    reserved_bytes: int = 0
    holders: tuple[Holder, ...] = ()
    problem: str | None = None
