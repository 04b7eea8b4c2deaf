"""What a test left behind on a device. Imports only the standard library."""

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
    """NVML's ``used``, other processes included; None if not measured."""
    used_after_bytes: int | None = None

    @property
    def left_bytes(self) -> int:
        """Negative if more was freed than made."""
        return self.after_bytes - self.before_bytes

    @property
    def used_left_bytes(self) -> int | None:
        if self.used_before_bytes is None or self.used_after_bytes is None:
            return None
        return self.used_after_bytes - self.used_before_bytes
