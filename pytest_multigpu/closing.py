"""The end of a run: baseline, verdict, and every report that was asked for. Knows no pytest."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from .errors import UsageError
from .files import read_text, why_unread
from .judging.baseline import check_run, key_of, measurements
from .judging.baseline_rule import parse_rule
from .judging.fleet import decide_fleet
from .judging.skips import ExpectedSkips, judge_skips, parse_expected_skips
from .judging.verdict import decide
from .options import Settings
from .records.report import CheckResult, RunReport
from .report.baseline import read_baselines, update_baseline
from .report.drift import DRIFT_FILE, keep_scores, read_drift


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

    :param exit_status: what pytest would exit with.
    """
    if report.pods:
        return _close_fleet(report, settings, exit_status)
    report = with_expected_skips(report, settings)
    if settings.baseline is not None and not settings.baseline_update:
        rule = parse_rule(settings.baseline_rule)
        known = read_baselines(settings.baseline)
        report = report.with_check(check_run(report, known, rule, file=str(settings.baseline)))
    verdict = decide(report, exit_status=exit_status, strict=settings.strict)
    # Only a READY run is worth being compared with.
    if verdict.ready:
        try:
            _keep(report, settings)
        except UsageError as error:
            # The folder filled up, say. What was asked for did not happen, and that is said last.
            unkept = CheckResult(
                nodeid="keeping what later runs are compared with",
                outcome="error",
                reason=str(error),
                is_check=False,
            )
            report = report.with_check(unkept)
            verdict = decide(report, exit_status=exit_status, strict=settings.strict)
    return replace(report, verdict=verdict)


def _keep(report: RunReport, settings: Settings) -> None:
    key = key_of(report)
    if settings.baseline is not None and settings.baseline_update and key:
        update_baseline(settings.baseline, key.text, measurements(report).values())
    if settings.report_dir is not None and report.scores is not None:
        keep_scores(settings.report_dir / DRIFT_FILE, report.scores)


def _close_fleet(report: RunReport, settings: Settings, exit_status: int) -> RunReport:
    """Each machine's run by itself, then one verdict over all."""
    pods = tuple(replace(pod, report=close_run(pod.report, settings, 0)) for pod in report.pods)
    whole = decide(report, exit_status=exit_status, strict=settings.strict)
    return replace(report, pods=pods, verdict=decide_fleet(pods, whole))


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
    judged = judge_skips(checks, expected)
    return replace(report, checks=(*checks, judged))


def write_reports(report: RunReport, settings: Settings, environ: Mapping[str, str]) -> None:
    """The page, and what GitHub shows of a run, where they were asked for."""
    if settings.report_dir is not None:
        from .report.html import write_page

        write_page(settings.report_dir, report)
    if environ.get("GITHUB_ACTIONS") == "true":
        from .report.github import annotation_lines, write_step_summary

        write_step_summary(report, environ)
        print(*annotation_lines(report), sep="\n", file=sys.stdout, flush=True)
