"""The end of a run on the terminal, as lines of data; the plugin prints them.

::

    GPU    name                   layers  weights   KV  predicted  measured  limit
    GPU 0  NVIDIA H100 80GB HBM3  0-18       32.2  0.1       33.8      36.3   78.7  GiB

    passed   free VRAM     4 GPUs          at least 36.0 GiB     78.7 GiB to 79.6 GiB
    FAILED   copy speed    GPU 0 -> GPU 2  at least 20 GB/s      7.50 GB/s
             GPU 0 -> GPU 2 is slow; rent a machine with NVLink

    NOT READY: GPU 0 -> GPU 2 is slow; rent a machine with NVLink (+1 more)

Imports records and units.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from ..records.check import Record
from ..records.report import CheckResult, RunReport
from ..units import gib
from .plan import plan_lines
from .tables import (
    MATRIX_FROM,
    Line,
    block_list,
    copy_matrices,
    gpu_table,
    phase_table,
)
from .words import (
    columns,
    expected_text,
    measured_text,
    number,
    pair_of,
    shown_device,
    verdict_colour,
)

__all__ = ["Line", "check_lines", "notes", "plan_lines", "summary_lines", "verdict_lines"]

_COLOURS = {
    "passed": ("green",),
    "warned": ("yellow",),
    "unknown": ("yellow",),
    "skipped": ("yellow",),
    "failed": ("red",),
    "error": ("red",),
}
_SHOWN = {"failed": "FAILED", "error": "ERROR"}


def summary_lines(report: RunReport, *, verbosity: int = 0) -> list[Line]:
    """Everything after pytest's own summary. ``-q`` leaves the verdict, ``-v`` adds the tables."""
    verdict = verdict_lines(report)
    if verbosity < 0:
        return verdict
    blocks = [gpu_table(report), notes(report), check_lines(report.checks, verbose=verbosity > 0)]
    if verbosity > 0:
        blocks += [phase_table(report), copy_matrices(report.checks)]
    lines: list[Line] = []
    for block in blocks:
        if block:
            lines += [*block, Line("")]
    return [*lines, *verdict]


def problem_lines(checks: Sequence[CheckResult]) -> list[Line]:
    """What is not as it should be among what was judged after the tables were printed."""
    return check_lines(
        [
            replace(check, records=tuple(r for r in check.records if r.outcome != "passed"))
            for check in checks
        ]
    )


def verdict_lines(report: RunReport) -> list[Line]:
    verdict = report.verdict
    if verdict is None:
        return []
    return [Line(verdict.line, (*verdict_colour(verdict), "bold"))]


def notes(report: RunReport) -> list[Line]:
    """Which weights, from where, how long; what is on the CPU; what broke in detection."""
    lines = []
    machine, plan, load = report.machine, report.plan, report.load
    if machine is not None and machine.problem:
        lines.append(Line(machine.problem, ("red",)))
    if plan is not None:
        grows = ", expandable segments" if machine and machine.expandable_segments else ""
        lines.append(
            Line(
                f"model {plan.architecture.model}, {plan.architecture.tier} "
                f"({plan.architecture.dtype}), {gib(plan.weights_bytes)} of weights "
                f"({plan.weights}), placement {plan.placement}, context {plan.context_tokens} "
                f"tokens x {plan.batch}{grows}"
            )
        )
        if plan.offloaded:
            lines.append(Line(f"off the GPUs: {block_list(plan.offloaded)}", ("red",)))
    if load is not None:
        rate = f", {load.bytes / load.seconds / 1e9:.1f} GB/s" if load.seconds > 0 else ""
        lines.append(
            Line(
                f"loaded {gib(load.bytes)} ({load.weights}) in {load.seconds:.1f} s{rate} "
                f"by {load.loader}"
            )
        )
        lines += [Line(f"note: {note}", ("yellow",)) for note in load.notes]
    return lines


def check_lines(checks: Sequence[CheckResult], *, verbose: bool = False) -> list[Line]:
    """A line for each record; passed ones that differ only in device share one.

    Under a line that is not passed: its reason and remedy. Skips for one and the same reason
    share a line too, unless verbose.
    """
    alike = Counter(check.reason for check in checks if check.outcome == "skipped")
    told: set[str] = set()
    rows: list[tuple[tuple[str, str, str, str, str], str, str]] = []
    for check in checks:
        if check.outcome == "skipped" and alike[check.reason] > 1 and not verbose:
            if check.reason not in told:
                told.add(check.reason)
                many = ("skipped", f"{alike[check.reason]} tests", "", "", "")
                rows.append((many, "skipped", check.reason))
            continue
        rows += _check_rows(check, verbose=verbose)
    texts = columns([cells for cells, _, _ in rows])
    lines = []
    for text, (_, outcome, below) in zip(texts, rows, strict=True):
        lines.append(Line(text, _COLOURS[outcome]))
        if below:
            lines.append(Line(f"         {below}", _COLOURS[outcome]))
    return lines


def _check_rows(
    check: CheckResult, *, verbose: bool
) -> list[tuple[tuple[str, str, str, str, str], str, str]]:
    rows: list[tuple[tuple[str, str, str, str, str], str, str]] = []
    outcome: str
    if check.outcome != "skipped":
        for group in grouped(check.records, each=verbose):
            first = group[0]
            outcome = first.outcome
            below = "; ".join(part for part in (first.reason.rstrip(". "), first.remedy) if part)
            cells = (
                _SHOWN.get(outcome, outcome).ljust(7),
                first.name,
                devices_text(group),
                expected_span(group),
                measured_span(group),
            )
            rows.append((cells, outcome, "" if outcome == "passed" else below))
    told = check.outcome == "passed" or (check.failed_records and not check.reason)
    # People's own tests that pass are pytest's to show; a check is never silent.
    if not told or (check.is_check and not rows):
        outcome = check.outcome
        name = check.nodeid.rpartition("::")[2] or check.nodeid
        cells = (_SHOWN.get(outcome, outcome).ljust(7), name, "", "", "")
        rows.append((cells, outcome, check.reason))
    return rows


def grouped(records: Sequence[Record], *, each: bool = False) -> list[list[Record]]:
    """Passed records of one name and unit together (in the place of the first); others alone.

    :param each: only pairs share a line, and only those that a matrix shows.
    """
    pairs = sum(pair_of(record.device) is not None for record in records)
    groups: dict[object, list[Record]] = {}
    for i, record in enumerate(records):
        together = record.outcome == "passed" and bool(record.device)
        if each:
            together = together and pairs >= MATRIX_FROM and pair_of(record.device) is not None
        key: object = (record.name, record.unit) if together else i
        groups.setdefault(key, []).append(record)
    return list(groups.values())


def devices_text(group: Sequence[Record]) -> str:
    """``GPU 2``, ``4 GPUs``, ``12 pairs``, ``3 chains``."""
    if len(group) == 1:
        return shown_device(group[0].device)
    kinds = {_kind(record.device) for record in group}
    kind = kinds.pop() if len(kinds) == 1 else "devices"
    return f"{len(group)} {kind}"


def _kind(device: str) -> str:
    arrows = device.count(" -> ")
    if arrows:
        return "pairs" if arrows == 1 else "chains"
    return "GPUs" if shown_device(device).startswith("GPU ") else "devices"


def expected_span(group: Sequence[Record]) -> str:
    return _span([record.expected for record in group], group, expected_text(group[0]))


def measured_span(group: Sequence[Record]) -> str:
    return _span([record.measured for record in group], group, measured_text(group[0]))


def _span(values: Sequence[object], group: Sequence[Record], single: str) -> str:
    """One text if all agree; ``148.2 to 201.3 GB/s`` for numbers; else ``various``."""
    if len(set(values)) == 1:
        return single
    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        ordered = sorted(v for v in values if isinstance(v, int | float))
        unit = group[0].unit
        if unit == "bytes":
            return f"{gib(ordered[0])} to {gib(ordered[-1])}"
        return f"{number(ordered[0])} to {number(ordered[-1])} {unit}".rstrip()
    return "various"
