"""What could be rented: one row a configuration that fits. Imports :mod:`.plan` only."""

from __future__ import annotations

from dataclasses import dataclass

from .plan import Tier

SHOWN = 6
"""Rows of each tier that are shown, the cheapest."""
MAX_COUNT = 16
"""GPUs of one configuration."""


@dataclass(frozen=True, kw_only=True)
class RentRow:
    """The fewest equal GPUs found on which a model fits in a tier under the balanced placement."""

    gpu: str
    """The catalogue's key: ``H100``, ``A100-80GB``."""
    count: int
    tier: Tier
    peak_bytes: int
    """Predicted peak of the fullest GPU in a split that fits: under balanced it is no higher."""
    free_bytes: int
    """Of one such GPU when idle."""
    tokens_per_second: float
    """An estimate, all sequences of the batch together: see ``planning.rent``."""
    price_usd_hour: float
    """Of the whole configuration."""
    price_guessed: str | None
    """When the price was guessed, ``2026-11``; None: ``--gpu-catalogue`` gives it."""
    usd_per_million_tokens: float
    """At the estimated speed."""

    @property
    def headroom_bytes(self) -> int:
        """Left on the fullest GPU."""
        return self.free_bytes - self.peak_bytes

    @property
    def spec(self) -> str:
        """As ``--gpu-simulate`` takes it: ``4xA6000``."""
        return f"{self.count}x{self.gpu}"
