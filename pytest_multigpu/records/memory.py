"""What a test took of a device and left behind on it. Imports only the standard library."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Leftover:
    """One device before and after, each time with garbage collected and caches given back."""

    device: str
    before_bytes: int
    """In live tensors, ``torch.cuda.memory_allocated``; for ``cpu`` the process's resident size."""
    after_bytes: int
    """The smallest of several readings."""
    used_before_bytes: int | None = None
    """In use by NVML, less what it shows of other processes; None if not measured."""
    used_after_bytes: int | None = None
    by_torch: bool = True
    """False: torch cannot use this GPU, and the tensors' bytes say nothing."""
    had_context: bool = True
    """This process had a CUDA context there before; a new one is no leftover."""

    @property
    def left_bytes(self) -> int:
        """Negative if more was freed than made."""
        return self.after_bytes - self.before_bytes

    @property
    def used_left_bytes(self) -> int | None:
        if self.used_before_bytes is None or self.used_after_bytes is None:
            return None
        return self.used_after_bytes - self.used_before_bytes


@dataclass(frozen=True, kw_only=True)
class Growth:
    """How far one GPU's memory went up during a test."""

    device: str
    """``cuda:0``."""
    live_bytes: int
    """In live tensors of this process when the test began."""
    had_context: bool
    """This process had a CUDA context there when the test began."""
    torch_bytes: int | None
    """Most in live tensors during the test; None if torch cannot use this GPU."""
    grown_bytes: int | None
    """Most in use by NVML less what was in use when the test began, each time without what NVML
    shows of other processes; None if not measured."""
    hidden_bytes: int = 0
    """Of nobody that NVML shows, at that moment."""
