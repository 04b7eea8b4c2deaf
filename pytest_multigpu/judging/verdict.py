"""READY or NOT READY, and the exit code. Pure: records only."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..records.check import Record
from ..records.machine import Machine
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
    least one check that measured something, nothing failed, and where checks ran on a real
    machine GPUs and a plan that fits, whichever checks were chosen. A run of people's own tests
    alone is neither READY nor NOT READY.

    :param exit_status: what pytest would exit with.
    :param strict: a hardware skip, an unmeasured record and a run without a check are failures.
    """
    executed = sum(check.executed for check in report.checks)
    failures = _failures(report.checks, strict=strict, nothing_else=not executed)
    failures += _of_the_machine(report, [rank for rank, _ in failures])
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
        counts = _counts(report.checks)[1:]
        if not strict and not any(check.is_check for check in report.checks):
            line = f"NOT CHECKED: {', '.join([*counts, 'no shipped check ran'])}"
            return Verdict(ready=False, checked=False, exit_code=EXIT_OK, line=line)
        reasons.append(f"no check was executed{_aside(counts)}")
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


def _failures(
    checks: tuple[CheckResult, ...], *, strict: bool, nothing_else: bool
) -> list[tuple[int, str]]:
    """Rank (worst is least) and sentence of everything that counts as failed.

    :param nothing_else: no check measured anything, so what was not measured is all there is.
    """
    found: list[tuple[int, str]] = []
    for check in checks:
        unmeasured = [
            record
            for record in check.records
            if record.outcome == "unknown"
            and (record.essential or strict or (nothing_else and check.is_check))
            and not check.expected_skip
        ]
        found.extend((_UNMEASURED, sentence(record)) for record in unmeasured)
        if check.outcome == "skipped":
            if strict and check.hardware_skip and not check.expected_skip:
                found.append((_SHORT, check.reason or f"{check.nodeid} was skipped"))
            continue
        for record in check.failed_records:
            found.append((_SHORT if record.shortfall else _BROKEN, sentence(record)))
        if check.failed and (check.reason or not check.failed_records):
            if not check.reason and unmeasured:
                continue  # the unmeasured records are why it failed
            text = f"{check.nodeid} failed" + (f": {check.reason}" if check.reason else "")
            if check.shortfall:
                found.append((_SHORT, check.reason or text))
            else:
                found.append((_CRASHED, text))
    return found


def _of_the_machine(report: RunReport, ranks: Sequence[int]) -> list[tuple[int, str]]:
    """What no choice of checks may pass over: GPUs that are not there, a plan that doesn't fit.

    :param ranks: of the failures known by then; what is at least as bad says it already.
    """
    if report.tier == "cpu" or not any(check.is_check for check in report.checks):
        return []
    found = _of_the_gpus(report.machine)
    plan = report.plan
    if found is None and report.unsettled is not None:
        found = _CRASHED, f"no plan could be made: {report.unsettled}"
    if found is None and plan is not None and not plan.fits:
        text = plan.reasons[0] if plan.reasons else "the plan does not fit"
        remedy = f"; {plan.remedies[0]}" if plan.remedies else ""
        found = _BROKEN if plan.mendable else _SHORT, f"{text}{remedy}"
    if found is None or (ranks and (found[0] == _SHORT or min(ranks) != _SHORT)):
        return []
    return [found]


def _of_the_gpus(machine: Machine | None) -> tuple[int, str] | None:
    if machine is None or machine.simulated is not None:
        return None
    if machine.problem is not None:
        return _BROKEN, f"the GPUs could not be asked: {machine.problem}"
    if machine.gpus and not machine.visible:
        count = f"{len(machine.gpus)} GPU{'' if len(machine.gpus) == 1 else 's'}"
        return _BROKEN, f"CUDA_VISIBLE_DEVICES={machine.visible_env!r} hides all {count}"
    if not machine.visible:
        return _SHORT, "this machine has no NVIDIA GPU; rent a machine with GPUs"
    lost = [gpu.problem for gpu in machine.visible_gpus if gpu.problem is not None]
    return (_BROKEN, lost[0]) if lost else None


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
    unmeasured = sum(check.unmeasured for check in checks)
    skipped = sum(check.outcome == "skipped" and not check.unmeasured for check in checks)
    warned = sum(record.outcome == "warned" for record in records)
    unknown = sum(record.outcome == "unknown" for record in records)
    parts = [f"{executed} check{'' if executed == 1 else 's'} passed"]
    if own:
        parts.append(f"{own} own test{'' if own == 1 else 's'} passed")
    if warned:
        parts.append(f"{warned} warning{'' if warned == 1 else 's'}")
    if unknown:
        parts.append(f"{unknown} unknown")
    if unmeasured:
        parts.append(f"{unmeasured} unmeasured")
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
