"""READY or NOT READY, and the exit code. Pure: records only."""

from __future__ import annotations

import re

from ..records.check import Record
from ..records.report import CheckResult, RunReport, Verdict

EXIT_OK, EXIT_FAILED, EXIT_SHORTFALL = 0, 1, 10

_PYTEST_SAYS = {
    2: "the run was interrupted",
    3: "pytest had an internal error",
    4: "pytest was used wrongly",
    5: "no test was collected",
}


def decide(report: RunReport, *, exit_status: int = 0, strict: bool = False) -> Verdict:
    """Judge a finished run.

    0: nothing failed. 1: a check or a test failed. 10: the machine falls short and nothing else
    failed. Every other exit code that pytest or another plugin gave is kept. READY needs at
    least one check that measured something, and nothing failed.

    :param exit_status: what pytest would exit with.
    :param strict: a hardware skip, an unmeasured record and a run without a check are failures.
    """
    failures = _failures(report.checks, strict=strict)
    executed = sum(check.executed for check in report.checks)
    reasons = list(dict.fromkeys(text for _, text in sorted(failures, key=lambda row: row[0])))
    kept = exit_status not in (EXIT_OK, EXIT_FAILED, EXIT_SHORTFALL)
    only_short = bool(failures) and all(rank == _SHORT for rank, _ in failures)
    if kept:
        said = _PYTEST_SAYS.get(exit_status, f"another plugin ended the run with {exit_status}")
        if report.running is not None:
            said += f" during {report.running}"
        # Strict: a run that collected nothing executed no check, and says it with pytest's code.
        # A file that cannot be imported interrupts the run: the file comes first.
        cause = exit_status == 2 and report.running is None and bool(reasons)
        reasons.insert(len(reasons) if cause else 0, said)
        code = exit_status
    elif failures:
        code = EXIT_SHORTFALL if only_short else EXIT_FAILED
    elif exit_status == EXIT_FAILED:
        reasons.append("pytest ended with exit code 1 although no test failed")
        code = EXIT_FAILED
    elif not executed:
        reasons.append(f"no check was executed{_aside(_counts(report.checks)[1:])}")
        # GPUs that vanished must not look like a run that had nothing to say about them.
        lacking = any(check.is_check and check.hardware_skip for check in report.checks)
        code = EXIT_FAILED if strict else EXIT_SHORTFALL if lacking else EXIT_OK
    else:
        return Verdict(ready=True, exit_code=EXIT_OK, line=_ready_line(report))
    more = f" (+{len(reasons) - 1} more)" if len(reasons) > 1 else ""
    return Verdict(
        ready=False,
        exit_code=code,
        line=f"NOT READY: {reasons[0]}{more}{scope_of(report)}",
        reasons=tuple(reasons),
    )


_BROKEN, _CRASHED, _UNMEASURED, _SHORT = range(4)


def _failures(checks: tuple[CheckResult, ...], *, strict: bool) -> list[tuple[int, str]]:
    """Rank (worst is least) and sentence of everything that counts as failed."""
    found: list[tuple[int, str]] = []
    for check in checks:
        if check.outcome == "skipped":
            if strict and check.hardware_skip and not check.expected_skip:
                found.append((_SHORT, check.reason or f"{check.nodeid} was skipped"))
            continue
        for record in check.failed_records:
            found.append((_SHORT if record.shortfall else _BROKEN, sentence(record)))
        unknown = [record for record in check.records if record.outcome == "unknown"]
        if strict:
            found.extend((_UNMEASURED, sentence(record)) for record in unknown)
        if check.failed and (check.reason or not check.failed_records):
            if not check.reason and unknown and strict:
                continue  # the unmeasured records are why it failed
            text = f"{check.nodeid} failed" + (f": {check.reason}" if check.reason else "")
            if check.shortfall:
                found.append((_SHORT, check.reason or text))
            else:
                found.append((_CRASHED, text))
    return found


def sentence(record: Record) -> str:
    """``<GPU>: <reason>; <remedy>``, the GPU only where the reason does not name it; or what was
    expected and measured where no reason is given."""
    text = record.reason.rstrip(". ")
    device = re.sub(r"\bcuda:(\d+)", r"GPU \1", record.device)
    if text and device.startswith("GPU ") and device not in text:
        text = f"{device}: {text}"
    if not text:
        where = f" on {record.device}" if record.device else ""
        text = f"{record.name}{where}: expected {record.expected}, measured {record.measured}"
    return f"{text}; {record.remedy}" if record.remedy else text


def _counts(checks: tuple[CheckResult, ...]) -> list[str]:
    """``23 checks passed``, then what else there is to say of them."""
    executed = sum(check.executed for check in checks)
    records = [r for check in checks if check.outcome != "skipped" for r in check.records]
    own = sum(
        not check.is_check and check.outcome == "passed" and not check.records for check in checks
    )
    skipped = sum(check.outcome == "skipped" for check in checks)
    warned = sum(record.outcome == "warned" for record in records)
    unknown = sum(record.outcome == "unknown" for record in records)
    parts = [f"{executed} check{'' if executed == 1 else 's'} passed"]
    if own:
        parts.append(f"{own} own test{'' if own == 1 else 's'} passed")
    if warned:
        parts.append(f"{warned} warning{'' if warned == 1 else 's'}")
    if unknown:
        parts.append(f"{unknown} unknown")
    if skipped:
        parts.append(f"{skipped} skipped")
    return parts


def _aside(parts: list[str]) -> str:
    return f" ({', '.join(parts)})" if parts else ""


def scope_of(report: RunReport) -> str:
    """What the run did not touch, so that nobody takes it for more than it is."""
    simulated = report.machine.simulated if report.machine else None
    if simulated:
        return f" (simulated {simulated}: plan only)"
    if report.tier == "cpu":
        return " (cpu tier: no GPU was checked)"
    return ""


def _ready_line(report: RunReport) -> str:
    scope = scope_of(report)
    subject = ""
    if report.plan is not None and report.tier != "cpu":
        subject = f"{report.plan.architecture.model} in {report.plan.architecture.tier}"
        gpus = report.machine.visible_gpus if report.machine else ()
        if gpus:
            names = list(dict.fromkeys(gpu.name for gpu in gpus))
            subject += " on " + " + ".join(
                f"{sum(gpu.name == name for gpu in gpus)} x {name}" for name in names
            )
        subject += ": "
    if not scope and report.load is None:
        scope = " (no model was loaded)"
    return f"READY: {subject}{', '.join(_counts(report.checks))}{scope}"
