"""What ``device_map="auto"`` would do. Imports :mod:`.plan` only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from .plan import DeviceMap, MaxMemory

Planner = Callable[[MaxMemory], DeviceMap]
"""transformers' own: ``max_memory`` in, device map out; where it refuses, what it would have done.
"""


@dataclass(frozen=True, kw_only=True)
class AutoMap:
    """The planner's answer."""

    device_map: Mapping[str, int | str] = field(default_factory=dict)
    """Module path to CUDA index, ``cpu`` or ``disk``; where it refuses, what it would have done."""
    refusal: str | None = None
    """The ValueError's text, in one line, with which from_pretrained would refuse; else None."""
    offloaded: tuple[str, ...] = ()
    """Modules on ``cpu`` or ``disk``, in forward order."""
