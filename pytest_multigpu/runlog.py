"""The run's log: from pytest's reports to one RunReport, its files and the last line.

A plugin object of its own, so that its hooks see only what they need. Under xdist the workers
keep facts and the controller alone prints.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import replace
from typing import Any

import pytest

from . import closing, markers
from .errors import UsageError
from .fixtures import session_of
from .progress import ProgressLine
from .records.check import Record
from .records.report import CheckResult, RunReport, Span
from .report import terminal
from .report.json import ReportFile


class RunLog:
    """Hears of every test; writes as the run goes; says READY or NOT READY at its end."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.session = session = session_of(config)
        self.is_worker = hasattr(config, "workerinput")
        # A controller hears of GPU tests only through its workers' reports.
        self.active = session.settings.asked or not self._distributes()
        self.began = time.monotonic()
        self.report = RunReport(
            started=time.time(), tier_asked=session.settings.tier, versions=session.versions
        )
        self._phases: dict[str, list[pytest.TestReport]] = {}
        self._spans: list[Span] = []
        closing.check_inputs(session.settings)
        folder = session.settings.report_dir
        self._file = None if folder is None or self.is_worker else ReportFile(folder)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Know whether the run is about GPUs at all, and start what can run ahead."""
        items = session.items
        if self.config.option.collectonly or self._distributes():
            return
        if not any(markers.check_needs(item) for item in items):
            return
        self.session.on_progress = ProgressLine(self.config)
        try:
            self.session.start(worker=any(map(_uses_worker, items)))
        except UsageError as error:
            raise pytest.UsageError(str(error)) from None

    def _distributes(self) -> bool:
        """The controller of an xdist run: its workers do the work."""
        return not self.is_worker and self.config.getoption("dist", "no") != "no"

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.report = replace(self.report, running=nodeid)
        if self.active:
            self._write()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.active = self.active or hasattr(report, "gpu")
        self._phases.setdefault(report.nodeid, []).append(report)
        if report.when == "teardown":
            self._end(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            crash = CheckResult(
                nodeid=report.nodeid or "collection",
                outcome="error",
                reason=_collect_reason(report),
                is_check=False,
            )
            self.report = self.report.with_check(crash)

    def _end(self, nodeid: str) -> None:
        phases = self._phases.pop(nodeid)
        seconds = sum(phase.duration for phase in phases)
        now = time.monotonic() - self.began
        self._spans.append(Span(nodeid=nodeid, start=now - seconds, end=now))
        self.report = replace(
            self._with_facts().with_check(_result(nodeid, phases, seconds)),
            spans=tuple(self._spans),
        )
        self._write()

    def _with_facts(self) -> RunReport:
        return replace(
            self.report, **self.session.facts(), wall_seconds=time.monotonic() - self.began
        )

    def _write(self) -> None:
        if self._file is not None:
            self._file.update(self._with_facts())

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(
        self, session: pytest.Session, exitstatus: int
    ) -> Generator[None, Any, Any]:
        """Outermost, so that the verdict is the last line of the run."""
        result = yield
        self.session.close()
        if self.is_worker or not self.active or self.config.option.collectonly:
            return result
        status = int(session.exitstatus)
        if status == pytest.ExitCode.USAGE_ERROR:
            return result  # pytest prints that one line itself
        settings = self.session.settings
        self.report = closing.close_run(self._with_facts(), settings, status)
        assert self.report.verdict is not None
        session.exitstatus = self.report.verdict.exit_code
        if self._file is not None:
            self._file.update(self.report)
        closing.write_reports(self.report, settings, self.session.environ)
        self._print(terminal.verdict_lines(self.report))
        return result

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """The tables, above pytest's own last line; the verdict follows after it."""
        verbosity = terminalreporter.verbosity
        if self.active and verbosity >= 0:
            self._print(terminal.summary_lines(self._with_facts(), verbosity=verbosity))

    def _print(self, lines: list[terminal.Line]) -> None:
        reporter = self.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            for line in lines:
                reporter.write_line(line.text, **line.kwargs)


def _uses_worker(item: pytest.Item) -> bool:
    return not {"gpu_worker", "gpu_health"}.isdisjoint(getattr(item, "fixturenames", ()))


def _result(nodeid: str, phases: list[pytest.TestReport], seconds: float) -> CheckResult:
    notes: dict[str, Any] = {}
    for phase in phases:
        notes.update({key: value for key, value in getattr(phase, "gpu", {}).items() if value})
    worst = next(
        (phase for phase in phases if phase.failed),
        next((phase for phase in phases if phase.skipped), phases[0]),
    )
    records = tuple(Record(**values) for values in notes.get("records", ()))
    outcome: Any = worst.outcome
    if worst.failed and worst.when != "call" and not notes.get("shortfall"):
        outcome = "error"
    return CheckResult(
        nodeid=nodeid,
        outcome=outcome,
        seconds=seconds,
        records=records,
        reason="" if worst.passed or (worst.failed and records) else _reason(worst),
        is_check=bool(notes.get("is_check")),
        hardware_skip=bool(notes.get("hardware_skip")),
        shortfall=bool(notes.get("shortfall")),
    )


def _collect_reason(report: pytest.CollectReport) -> str:
    """``could not be collected: ModuleNotFoundError: No module named 'x'``."""
    raised = [line[1:].strip() for line in report.longreprtext.splitlines() if line[:2] == "E "]
    return f"could not be collected{f': {raised[-1]}' if raised else ''}"


def _reason(report: pytest.TestReport) -> str:
    """Why it was skipped, or the first line of what it raised."""
    if report.skipped and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    text = str(crash.message if crash is not None else report.longrepr)
    # pytest.fail puts its own name before the text.
    text = text.strip().removeprefix("Failed: ")
    return text.splitlines()[0] if text else "failed without a message"
