"""The end of a run: baseline, verdict, and every report that was asked for. Knows no pytest."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from .errors import MultiGpuError, UsageError
from .files import read_text, why_unread
from .judging.baseline import check_run, key_of, measurements
from .judging.baseline_rule import parse_rule
from .judging.fleet import decide_fleet
from .judging.skips import ExpectedSkips, judge_skips, parse_expected_skips
from .judging.verdict import decide
from .options import Settings
from .records.check import Record
from .records.report import CheckResult, RunReport
from .report.baseline import read_baselines, update_baseline
from .report.drift import DRIFT_FILE, keep_scores, read_drift
from .report.folder import HTML_FILE, ReportFile


def check_inputs(settings: Settings) -> None:
    """Find bad baseline options, and damaged files of earlier runs, before the run.

    :raises UsageError: a rule or a file that cannot be read.
    """
    parse_rule(settings.baseline_rule)
    if settings.baseline is not None:
        read_baselines(settings.baseline)
    if settings.report_dir is not None:
        read_drift(settings.report_dir / DRIFT_FILE)
    read_expected_skips(settings.expected_skips)


def read_expected_skips(path: Path | None) -> ExpectedSkips | None:
    """The list of ``--gpu-expected-skips``; None without that option.

    :raises UsageError: it cannot be read.
    """
    if path is None:
        return None
    try:
        text = read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        why = why_unread(error)
        raise UsageError(f"--gpu-expected-skips: {path}: cannot be read: {why}") from None
    return parse_expected_skips(text, str(path))


def close_run(report: RunReport, settings: Settings, exit_status: int) -> RunReport:
    """The finished run with its verdict; the baseline is compared, and updated if READY, as are
    the scores that later runs are held against.

    What goes wrong with one of them is a failed record of the run.

    :param exit_status: what pytest would exit with.
    """
    if report.pods:
        return _close_fleet(report, settings, exit_status)
    for option, step in (
        ("--gpu-expected-skips", with_expected_skips),
        ("--gpu-baseline", _with_comparison),
    ):
        try:
            report = step(report, settings)
        except (OSError, MultiGpuError) as error:
            report = _with(report, unwritten(option, error))
    report = decided(report, settings, exit_status)
    assert report.verdict is not None
    if not report.verdict.ready:
        return report  # only a READY run is worth being compared with
    for option, keep in (("--gpu-baseline-update", _update_baseline), ("--gpu-report", _keep)):
        try:
            keep(report, settings)
        except (OSError, MultiGpuError) as error:
            report = _with(report, unwritten(option, error))
    return decided(report, settings, exit_status)


def _with(report: RunReport, check: CheckResult) -> RunReport:
    """One more entry; what was running when the run was interrupted stays told."""
    return replace(report, checks=(*report.checks, check))


def decided(report: RunReport, settings: Settings, exit_status: int) -> RunReport:
    """With the verdict over what is in the report by now."""
    verdict = decide(report, exit_status=exit_status, strict=settings.strict)
    if report.pods:
        verdict = decide_fleet(report.pods, verdict)
    return replace(report, verdict=verdict)


def _close_fleet(report: RunReport, settings: Settings, exit_status: int) -> RunReport:
    """Each machine's run by itself, then one verdict over all."""
    pods = tuple(replace(pod, report=close_run(pod.report, settings, 0)) for pod in report.pods)
    return decided(replace(report, pods=pods), settings, exit_status)


def with_expected_skips(report: RunReport, settings: Settings) -> RunReport:
    """The run with its skips held against the list, where one was given."""
    expected = read_expected_skips(settings.expected_skips)
    if expected is None:
        return report
    checks = tuple(
        replace(
            check,
            expected_skip=check.outcome == "skipped" and expected.entry(check.nodeid) is not None,
        )
        for check in report.checks
    )
    return _with(replace(report, checks=checks), judge_skips(checks, expected))


def _with_comparison(report: RunReport, settings: Settings) -> RunReport:
    if settings.baseline is None or settings.baseline_update:
        return report
    rule = parse_rule(settings.baseline_rule)
    known = read_baselines(settings.baseline)
    return _with(report, check_run(report, known, rule, file=str(settings.baseline)))


def _update_baseline(report: RunReport, settings: Settings) -> None:
    if settings.baseline is None or not settings.baseline_update:
        return
    key = key_of(report)
    if key is None:
        raise UsageError(
            "--gpu-baseline-update: this run made no plan to record under; run more of the checks"
        )
    update_baseline(settings.baseline, key.text, measurements(report).values())


def _keep(report: RunReport, settings: Settings) -> None:
    if settings.report_dir is not None and report.scores is not None:
        keep_scores(settings.report_dir / DRIFT_FILE, report.scores)


def write_reports(
    report: RunReport,
    settings: Settings,
    exit_status: int,
    *,
    file: ReportFile | None,
    environ: Mapping[str, str],
) -> RunReport:
    """The page, the last state of ``report.json``, and what GitHub shows, where asked for.

    Gives the run with a failed record for what was asked for and could not be written, a warning
    for GitHub's summary, and the verdict over these too: every report is to say the same.
    """
    on_github = environ.get("GITHUB_ACTIONS") == "true"
    whole = True

    def write(option: str, step: Callable[[RunReport], object], *, asked: bool = True) -> None:
        nonlocal report, whole
        try:
            step(report)
        except (OSError, MultiGpuError) as error:
            whole = False
            report = _with(report, unwritten(option, error, asked=asked))
            report = decided(report, settings, exit_status)

    if file is not None:
        write("--gpu-report", lambda run: _page(file, run))
        write("--gpu-report", file.update)
    if on_github:
        write("GITHUB_STEP_SUMMARY", lambda run: _step_summary(run, environ), asked=False)
    if file is not None and not whole:
        _write_again(file, report)
    if on_github:
        from .report.github import annotation_lines

        for line in annotation_lines(report):
            print(line, file=sys.stdout, flush=True)
    return report


def _write_again(file: ReportFile, report: RunReport) -> None:
    """With the verdict that has changed meanwhile; a page that says another one is removed."""
    with suppress(OSError, MultiGpuError):
        file.update(report)
    try:
        _page(file, report)
    except (OSError, MultiGpuError):
        with suppress(OSError):
            (file.folder / HTML_FILE).unlink(missing_ok=True)


def _page(file: ReportFile, report: RunReport) -> None:
    from .report.html import write_page

    file.open()
    write_page(file.folder, report)


def _step_summary(report: RunReport, environ: Mapping[str, str]) -> None:
    from .report.github import write_step_summary

    write_step_summary(report, environ)


def unwritten(option: str, error: Exception, *, asked: bool = True) -> CheckResult:
    """What could not be read or written at the end: failed if it was asked for, else a warning."""
    reason, remedy = str(error), ""
    if isinstance(error, OSError):
        reason = f"{option}: cannot be written ({error.strerror or error})"
        remedy = "free some space, or name another place"
    record = Record(
        name=option,
        outcome="failed" if asked else "warned",
        expected="written",
        measured="not written",
        reason=reason,
        remedy=remedy,
    )
    return CheckResult(
        nodeid=option, outcome="failed" if asked else "passed", records=(record,), is_check=False
    )
