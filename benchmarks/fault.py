"""What a fault of the campaign is: how it is planted, and what the run must say."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SECONDS = 150.0
"""No run of the campaign takes longer: beyond it a fault counts as a hang that was not ended."""

Plant = tuple[str, dict[str, Any]]
Prepare = Callable[[Path], "Mapping[str, str] | None"]
"""Writes files into the run's own folder; may return values for ``{name}`` in the arguments."""
Around = Callable[[Path], "contextlib.AbstractContextManager[None]"]


class NotHereError(Exception):
    """The fault can't be planted on this machine; the text says why."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault, how to plant it, and what the run must say."""

    name: str
    issue: int
    reason: str
    """Regular expression that the last line must match, after ``NOT READY: ``."""
    exit: int = 1
    args: str = "-m quick"
    """``{folder}`` and what ``prepare`` returns are filled in."""
    plants: tuple[Plant, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    prepare: Prepare | None = None
    around: Around | None = None
    """Entered before the run and left after it: another process, a mounted disk."""
    also: tuple[str, ...] = ()
    """What else may be red in its wake, each as ``<GPU>: <reason>``; all the rest may not."""
    line: str = ""
    """What the last line must match where worse than ``reason`` comes first."""
    killed: bool = False
    """The run itself is killed: its report must name ``reason`` as what was running."""
    never: str = ""
    """A file that must not have come about."""
    checks: bool = True
    """Run the shipped checks; False: only what ``args`` names."""
    limit: float = SECONDS
    fast: bool = False
    """Part of the subset that the tests run."""
    alone: bool = False
    """Runs with nothing beside it."""

    @property
    def expected(self) -> str:
        if self.killed:
            return f"killed during {self.reason}"
        verdict = "READY" if not self.exit else "NOT READY"
        return f"{verdict}, exit {self.exit}: {self.reason}"
