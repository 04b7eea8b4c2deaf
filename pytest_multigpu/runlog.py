"""The run's log: from pytest's reports to one RunReport, its files and the last line.

A plugin object of its own, so that its hooks see only what they need. Under xdist the workers
keep facts and the controller alone prints.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Generator
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from . import closing, markers
from .concern import about_gpus
from .errors import MultiGpuError
from .fixtures import session_of
from .judging.verdict import EXIT_SHORTFALL
from .options import asked
from .parallel import distributes
from .parallel.controller import XdistController
from .progress import ProgressLine
from .records.report import CheckResult, RunReport, Span
from .report import terminal
from .report.fleet import fleet_lines
from .report.folder import ReportFile
from .results import result_of, uncollected, with_reruns
from .usage import usage_errors

if TYPE_CHECKING:
    from .machine.timeline import Timeline
    from .session import GpuSession


class RunLog:
    """Hears of every test; writes as the run goes; says READY or NOT READY at its end."""

    def __init__(self, config: pytest.Config) -> None:
        """:raises UsageError: an option, or a file that one names, cannot be."""
        self.config = config
        self.is_worker = hasattr(config, "workerinput")
        self.controller = XdistController(config) if distributes(config) else None
        self.active = False
        """The run is about GPUs. A controller hears it only through its workers' reports."""
        self.began = time.monotonic()
        self.report = RunReport(started=time.time())
        self._file: ReportFile | None = None
        self._phases: dict[tuple[str, str], list[pytest.TestReport]] = {}
        """By worker and node id."""
        self._written: str | None = None
        """What the file says is running."""
        self._reruns: Counter[tuple[str, str]] = Counter()
        self._running: list[str] = []
        self._coming: list[str] = []
        """Tests that are about to run, in each worker at most one."""
        self._timeline: Timeline | None = None
        self._lock = threading.RLock()
        """The watchdog writes from a thread of its own."""
        self._spans: list[Span] = []
        if self.controller is None or asked(config):
            self._begin()

    def _begin(self) -> None:
        settings = self.session.settings
        closing.check_inputs(settings)
        versions = self.session.versions
        self.report = replace(self.report, tier_asked=settings.tier, versions=versions)
        if settings.report_dir is not None and not self.is_worker:
            self._file = ReportFile(settings.report_dir)
        self.active = True

    @property
    def session(self) -> GpuSession:
        return session_of(self.config)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self) -> None:
        """A controller collects nothing: it finds here that the folder cannot be written."""
        if self.controller is not None and not self.config.option.collectonly:
            self._open()

    @pytest.hookimpl(wrapper=True)
    def pytest_collection_finish(self, session: pytest.Session) -> Generator[None, object, object]:
        """Know whether the run is about GPUs at all, and start what can run ahead."""
        if self.controller is None and not self.config.option.collectonly:
            self._open()
            with usage_errors(self.config):
                self._start(session.items)
        return (yield)

    def _open(self) -> None:
        if self._file is not None:
            with usage_errors(self.config):
                self._file.open()

    def _start(self, items: list[pytest.Item]) -> None:
        ours = [item for item in items if about_gpus(item)]
        if not ours:
            self.session.end_worker()  # it ran ahead for checks that were then deselected
            return
        self.session.on_progress = ProgressLine(self.config)
        wanted = markers.wanted(ours)
        if self.is_worker:  # it starts once its GPUs are its own
            if wanted.plan:
                self.session.check_inputs()
            return
        self.session.start(wanted)
        self._draw()
        self._coming = [items[0].nodeid]
        self._write()

    def _draw(self) -> None:
        """Sample VRAM for the report's plot."""
        machine = self.session.facts().get("machine")
        if self._file is None or machine is None or machine.simulated or not machine.visible:
            return
        from .machine.timeline import Timeline

        devices = {index: f"cuda:{number}" for number, index in enumerate(machine.visible)}
        self._timeline = Timeline(devices)
        self._timeline.start(self.began)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        with self._lock:
            self._running.append(nodeid)
            if nodeid in self._coming:
                self._coming.remove(nodeid)
            self._show_running()
            # Who is killed while he writes leaves the file before: it names this test already.
            if self.active and self._written != self.report.running:
                self._write()

    def _show_running(self) -> None:
        """Under xdist several run at once."""
        self.report = replace(self.report, running=", ".join(self._running) or None)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        with self._lock:
            worker = ""
            if self.controller is not None:
                self._hear(report)
                worker = self.controller.hear(report)
            key = worker, report.nodeid
            self._phases.setdefault(key, []).append(report)
            # xdist gives a crashed worker's test a report of no phase.
            if report.when not in ("setup", "call"):
                self._end(key)

    def _hear(self, report: pytest.TestReport) -> None:
        """The first word of a test about GPUs."""
        if not self.active and hasattr(report, "gpu"):
            with usage_errors(self.config):
                self._begin()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if not report.passed:
            self.report = self.report.with_check(uncollected(report))

    def _end(self, key: tuple[str, str]) -> None:
        phases = self._phases.pop(key)
        worker, nodeid = key
        if nodeid in self._running:
            self._running.remove(nodeid)
        outcomes: set[str] = {phase.outcome for phase in phases}
        if "rerun" in outcomes:
            self._reruns[key] += 1  # pytest-rerunfailures tries again; only the last one counts
            self._coming.append(nodeid)
            return
        self._coming += filter(None, [getattr(phases[-1], "gpu", {}).get("next")])
        seconds = sum(phase.duration for phase in phases)
        now = time.monotonic() - self.began
        self._spans.append(Span(nodeid=nodeid, start=now - seconds, end=now))
        result = result_of(nodeid, phases, seconds)
        if self._reruns[key]:
            result = with_reruns(result, self._reruns[key])
        if self.controller is not None and self.controller.is_fleet:
            result = replace(result, worker=worker)
        self.report = replace(
            self._with_facts().with_check(result),
            spans=tuple(self._spans),
        )
        self._show_running()
        self._write()

    def _with_facts(self) -> RunReport:
        facts = self.session.facts() if self.controller is None else self.controller.facts()
        if self._timeline is not None:
            facts["vram"] = self._timeline.samples()
        return replace(self.report, **facts, wall_seconds=time.monotonic() - self.began)

    def _write(self) -> None:
        """Between two tests the file names the one that is about to run."""
        if self._file is not None:
            self._written = ", ".join([*self._running, *self._coming]) or None
            # A disk that is full for a moment; the last write of the run is the one that counts.
            with suppress(OSError, MultiGpuError):
                self._file.update(replace(self._with_facts(), running=self._written))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(
        self, session: pytest.Session, exitstatus: int
    ) -> Generator[None, Any, Any]:
        """Outermost, so that the verdict is the last line of the run."""
        self._settle(exitstatus)
        result = yield
        if self.active:
            self.session.close()
        if self._timeline is not None:
            self._timeline.stop()
        if self.controller is not None and self.controller.refused:
            raise pytest.UsageError(*self.controller.refused)
        if self.is_worker or not self.active or self.config.option.collectonly:
            return result
        status = int(session.exitstatus)
        if status == pytest.ExitCode.USAGE_ERROR:
            return result  # pytest prints that one line itself
        ran = self._with_facts()
        if status in (pytest.ExitCode.OK, EXIT_SHORTFALL) and self._broken_off():
            status = int(pytest.ExitCode.INTERRUPTED)
        if self.controller is not None and self.controller.is_fleet:
            ran = replace(ran, pods=self.controller.pods(ran))
        self.report = self._finish(ran, status)
        assert self.report.verdict is not None
        session.exitstatus = self.report.verdict.exit_code
        if self.config.get_verbosity() >= 0:
            late = self.report.checks[len(ran.checks) :]
            self._print(terminal.problem_lines(late))
        self._print([*fleet_lines(self.report.pods), *terminal.verdict_lines(self.report)])
        return result

    def _broken_off(self) -> bool:
        """A test began and did not end, or was next and did not begin: ``pytest.exit`` with a code
        of its own, or a second Ctrl-C. Under xdist what was next may have gone to another worker.
        """
        left = {*self._running, *(self._coming if self.controller is None else ())}
        return not left <= {check.nodeid for check in self.report.checks}

    def _settle(self, exitstatus: int) -> None:
        """A verdict over checks rests on machine and plan, whichever checks were chosen."""
        checks = [check for check in self.report.checks if check.is_check]
        if self.controller is None and checks and not exitstatus:
            self.session.settle()

    def _finish(self, report: RunReport, status: int) -> RunReport:
        settings = self.session.settings
        report = closing.close_run(report, settings, status)
        environ = self.session.environ
        return closing.write_reports(report, settings, status, file=self._file, environ=environ)

    def give_up(self, nodeid: str, reason: str) -> None:
        """The watchdog's: a test hangs where nothing can interrupt it. Ends the process."""
        with self._lock:
            hung = CheckResult(nodeid=nodeid, outcome="error", reason=reason)
            report = replace(self._with_facts().with_check(hung), running=nodeid)
            report = closing.close_run(report, replace(self.session.settings, baseline=None), 1)
            if self._file is not None:
                with suppress(OSError, MultiGpuError):
                    self._file.update(report)
            capture = self.config.pluginmanager.get_plugin("capturemanager")
            if capture is not None:
                capture.suspend_global_capture(in_=True)
            faulthandler.dump_traceback(file=sys.__stderr__ or 2)
            if not self.is_worker and report.verdict is not None:
                print(f"\n{report.verdict.line}", file=sys.__stdout__, flush=True)
            os._exit(1)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """The tables, above pytest's own last line; the verdict follows after it."""
        verbosity = terminalreporter.verbosity
        if self.controller is not None and self.controller.is_fleet:
            return  # its one table comes with the verdicts
        if self.active and verbosity >= 0:
            self._print(terminal.summary_lines(self._with_facts(), verbosity=verbosity))

    def _print(self, lines: list[terminal.Line]) -> None:
        reporter = self.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            for line in lines:
                reporter.write_line(line.text, **line.kwargs)
