"""How far a load has come, as a progress bar needs it. Imports only the standard library."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One moment of a load."""

    bytes_done: int
    """Read or synthesised so far, before quantisation."""
    bytes_total: int
    seconds: float
    """Since the first byte was asked for."""

    @property
    def gb_per_second(self) -> float:
        """Mean so far, in 10**9 bytes per second; 0.0 before any time has passed."""
        return self.bytes_done / 1e9 / self.seconds if self.seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        """At the mean rate so far; None while nothing has been done."""
        if self.bytes_done == 0:
            return None
        return self.seconds * (self.bytes_total - self.bytes_done) / self.bytes_done
