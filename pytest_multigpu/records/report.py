"""A whole run: what was asked, found, planned, loaded and checked, and the verdict.

Every report (terminal, JSON, HTML, GitHub, JUnit) is a view of one :class:`RunReport`.
Imports only other records and the standard library.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from .check import Record
from .drift import TextScores
from .machine import Machine
from .model import LoadReport, PhasePeaks, Placement
from .plan import Plan

TestOutcome = Literal["passed", "failed", "skipped", "error"]
"""pytest's own; ``error`` is a failure in set-up, tear-down or collection."""


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """One test that ended: a shipped check, or somebody's own test."""

    nodeid: str
    outcome: TestOutcome
    seconds: float = 0.0
    records: tuple[Record, ...] = ()
    reason: str = ""
    """Why it was skipped, or the last line of what it raised; empty if the records say it."""
    is_check: bool = True
    """A check of this package; False for people's own tests."""
    hardware_skip: bool = False
    """Skipped because the machine lacks what it needs."""
    expected_skip: bool = False
    """Skipped, and ``--gpu-expected-skips`` says that it is."""
    worker: str = ""
    """Where it ran, if every machine of a fleet runs every test: ``gw1``."""
    shortfall: bool = False
    """A failure without records that means only that the machine falls short."""

    @property
    def failed_records(self) -> tuple[Record, ...]:
        return tuple(record for record in self.records if record.outcome == "failed")

    @property
    def failed(self) -> bool:
        """Failed by pytest's account, or passed there although a record says otherwise."""
        if self.outcome == "passed":
            return bool(self.failed_records)
        return self.outcome in ("failed", "error")

    @property
    def executed(self) -> bool:
        """A check that ran and measured something: passed, warned or failed."""
        return (
            self.is_check
            and self.outcome != "skipped"
            and any(record.outcome != "unknown" for record in self.records)
        )

    @property
    def unmeasured(self) -> bool:
        """A check that was begun and could measure nothing at all."""
        return (
            self.is_check
            and self.outcome == "skipped"
            and any(record.outcome == "unknown" for record in self.records)
        )


@dataclass(frozen=True, kw_only=True)
class VramSample:
    """NVML ``used`` of one GPU at one moment."""

    seconds: float
    """Since the run started."""
    device: str
    """``cuda:0``."""
    used_bytes: int


@dataclass(frozen=True, kw_only=True)
class Span:
    """When a test ran, in seconds since the run started."""

    nodeid: str
    start: float
    end: float


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """READY or NOT READY; or neither, where none of the shipped checks took part."""

    ready: bool
    checked: bool = True
    """False: only people's own tests ran, and none failed."""
    exit_code: int
    line: str
    """The last line of the run: ``READY: ...``, ``NOT READY: ...`` or ``NOT CHECKED: ...``."""
    reasons: tuple[str, ...] = ()
    """Why it is not ready, a sentence each with its remedy, worst first."""

    @property
    def word(self) -> str:
        """``READY``, ``NOT READY`` or ``NOT CHECKED``."""
        return "READY" if self.ready else "NOT READY" if self.checked else "NOT CHECKED"


@dataclass(frozen=True, kw_only=True)
class Pod:
    """One machine of a fleet and its own run."""

    name: str
    """xdist's name of the worker: ``gw0``, or the id of its ``--tx``."""
    host: str
    report: RunReport


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """The run so far. Frozen: ``replace`` or ``with_check`` make the next state."""

    machine: Machine | None = None
    plan: Plan | None = None
    load: LoadReport | None = None
    placement: Placement | None = None
    """As observed after loading."""
    checks: tuple[CheckResult, ...] = ()
    unsettled: str | None = None
    """Why there is no plan for the verdict to rest on, although a check ran."""
    running: str | None = None
    """Node id of the test that runs now, or is about to; in a finished report None."""
    tier_asked: str = "auto"
    tier: str | None = None
    """The tier that was checked; None if none was chosen yet or none fits."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Package to version: ``torch``, ``transformers``, ..."""
    started: float = 0.0
    """Seconds since the epoch."""
    wall_seconds: float = 0.0
    peaks: tuple[PhasePeaks, ...] = ()
    scores: TextScores | None = None
    """Of the fixed text set; None if they were not asked for, or could not be had."""
    vram: tuple[VramSample, ...] = ()
    spans: tuple[Span, ...] = ()
    pods: tuple[Pod, ...] = ()
    """The machines of a fleet (``--dist=each``); empty for a run on one machine."""
    verdict: Verdict | None = None
    """None while the run goes on."""

    def with_check(self, check: CheckResult) -> RunReport:
        """The same run with one more finished test, and nothing running."""
        return replace(self, checks=(*self.checks, check), running=None)
