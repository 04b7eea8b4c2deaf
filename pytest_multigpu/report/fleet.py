"""Several machines in one table, as lines of data.

::

    machine         GPUs                       passed  failed  verdict
    gw0 (pod-a)     4 x NVIDIA H100 80GB HBM3      12       0  READY
    gw1 (pod-b)     none                            2       3  NOT READY: no GPU; rent another

Imports records and the tables' words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ..records.report import Pod
from .tables import Line
from .words import columns, verdict_colour


def fleet_lines(pods: Sequence[Pod]) -> list[Line]:
    """A line for each machine, in the order of their names; none without a fleet."""
    if not pods:
        return []
    rows = [("machine", "GPUs", "passed", "failed", "verdict")]
    rows += [_row(pod) for pod in pods]
    texts = columns(rows)
    colours = [(), *(verdict_colour(pod.report.verdict) for pod in pods)]
    return [Line(text, colour) for text, colour in zip(texts, colours, strict=True)]


def _row(pod: Pod) -> tuple[str, str, str, str, str]:
    report = pod.report
    failed = sum(check.failed for check in report.checks)
    passed = sum(check.outcome == "passed" and not check.failed for check in report.checks)
    verdict = report.verdict
    said = "unknown" if verdict is None else "READY" if verdict.ready else verdict.line
    name = f"{pod.name} ({pod.host})" if pod.host else pod.name
    return name, _gpus(pod), str(passed), str(failed), said


def _gpus(pod: Pod) -> str:
    machine = pod.report.machine
    if machine is None:
        return "not looked at"
    names = Counter(gpu.name for gpu in machine.visible_gpus)
    return " + ".join(f"{count} x {name}" for name, count in names.items()) or "none"
