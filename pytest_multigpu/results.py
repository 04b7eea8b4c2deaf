"""From pytest's reports of one test to one CheckResult."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from .records.check import Record
from .records.report import CheckResult


def result_of(nodeid: str, phases: Sequence[pytest.TestReport], seconds: float) -> CheckResult:
    """How a test ended, over set-up, call and tear-down; with what our hooks noted on it."""
    notes: dict[str, Any] = {}
    for phase in phases:
        notes.update({key: value for key, value in getattr(phase, "gpu", {}).items() if value})
    worst = next(
        (phase for phase in phases if phase.failed),
        next((phase for phase in phases if _is_skip(phase)), phases[0]),
    )
    records = tuple(Record(**values) for values in notes.get("records", ()))
    outcome: Any = "failed" if worst.failed else "skipped" if _is_skip(worst) else "passed"
    if worst.failed and worst.when != "call" and not notes.get("shortfall"):
        outcome = "error"
    return CheckResult(
        nodeid=nodeid,
        outcome=outcome,
        seconds=seconds,
        records=records,
        reason="" if outcome == "passed" or (worst.failed and records) else _reason(worst),
        is_check=bool(notes.get("is_check")),
        hardware_skip=bool(notes.get("hardware_skip")),
        shortfall=bool(notes.get("shortfall")),
    )


def _is_skip(phase: pytest.TestReport) -> bool:
    """A failure that ``xfail`` expects is a skip to pytest's reports, though the test has run; and
    the reports of subtests, which have a ``context``, are not the test's own."""
    if hasattr(phase, "context"):
        return False
    return phase.skipped and _NOTRUN in getattr(phase, "wasxfail", _NOTRUN)


_NOTRUN = "[NOTRUN]"
"""How pytest marks what ``xfail(run=False)`` kept from running."""


def with_reruns(result: CheckResult, reruns: int) -> CheckResult:
    """A check that passes only when tried again says so."""
    times = f"{reruns} time{'' if reruns == 1 else 's'}"
    note = Record(
        name="reruns",
        outcome="warned",
        expected=0,
        measured=reruns,
        reason=f"{result.nodeid} failed {times} before this",
    )
    return replace(result, records=(*result.records, note))


def uncollected(report: pytest.CollectReport) -> CheckResult:
    """A file that could not be collected, or was skipped whole."""
    return CheckResult(
        nodeid=report.nodeid or "collection",
        outcome="error" if report.failed else "skipped",
        reason=_collect_reason(report) if report.failed else _reason(report),
        is_check=False,
    )


def _collect_reason(report: pytest.CollectReport) -> str:
    """``could not be collected: ModuleNotFoundError: No module named 'x'``."""
    raised = [line[1:].strip() for line in report.longreprtext.splitlines() if line[:2] == "E "]
    return f"could not be collected{f': {raised[-1]}' if raised else ''}"


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Why it was skipped, or the first line of what it raised."""
    wasxfail: str | None = getattr(report, "wasxfail", None)
    if wasxfail is not None and _NOTRUN in wasxfail:
        return wasxfail.partition(_NOTRUN)[2].strip()
    if report.skipped and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    text = str(crash.message if crash is not None else report.longrepr)
    # pytest.fail puts its own name before the text.
    text = text.strip().removeprefix("Failed: ")
    return text.splitlines()[0] if text else "failed without a message"
