"""What a check found. Every report prints these same records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Outcome = Literal["passed", "failed", "warned", "unknown"]
"""``unknown``: it could not be measured. That never counts as passed."""

Value = str | int | float | bool | None


@dataclass(frozen=True, kw_only=True)
class Record:
    """One thing measured against one expectation."""

    name: str
    """Short and stable: ``free VRAM``, ``copies between GPUs``."""
    outcome: Outcome
    expected: Value = None
    """The requirement in words or as a number in ``unit``: ``at least 40``, ``equal``."""
    measured: Value = None
    unit: str = ""
    """``bytes`` (people see GiB), ``GB/s``, ``tokens/s``, ``s``, ``GPUs``; empty for words."""
    device: str = ""
    """``GPU 2``, ``GPU 0 -> GPU 1``; empty for the machine or the whole model."""
    reason: str = ""
    """One sentence, for every outcome but ``passed``."""
    remedy: str = ""
    """What to do about it, as a command where there is one."""
    shortfall: bool = False
    """The machine lacks what was asked for (exit 10: rent another), nothing is broken."""
    essential: bool = False
    """READY rests on it: where it is ``unknown``, the check fails."""
