"""The tiers. A file of their own: options need them in every run, and nothing else of a plan."""

from __future__ import annotations

from typing import Literal

Tier = Literal["cpu", "4bit", "8bit", "16bit"]
TIERS: tuple[Tier, ...] = ("cpu", "4bit", "8bit", "16bit")
"""From least to most demanding."""
GPU_TIERS: tuple[Tier, ...] = ("16bit", "8bit", "4bit")
"""Best first: what ``auto`` tries."""
