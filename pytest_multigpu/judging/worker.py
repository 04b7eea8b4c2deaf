"""Did the CUDA worker come through, and what is said of what it left unmeasured.

Pure: records in, records out.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..records.check import Record
from ..records.worker import STARTING, WorkerReport

WORKER_REMEDY = (
    "look for Xid errors with `dmesg | grep -i xid`, reset the named GPU with "
    "`nvidia-smi --gpu-reset -i N`, or rent another machine"
)

IMPORT_REMEDY = (
    "`python -c 'import torch'` in an empty folder must work: if it does not, reinstall torch; if "
    "it does, look for files on PYTHONPATH that are named like modules of Python or torch"
)

UNSTARTED_REMEDY = "look at `ulimit -u`, at the container's pids.max, and at free memory"
ESSENTIAL = frozenset({"uploads", "copies", "chains", "arithmetic"})
"""Steps without which nothing is known of the bytes and numbers that a split model gets."""


def gpu_path(gpus: Sequence[int]) -> str:
    """``GPU 0 -> GPU 1``."""
    return " -> ".join(f"GPU {gpu}" for gpu in gpus)


def not_measured(report: WorkerReport, name: str, expected: str, *steps: str) -> list[Record]:
    """Records for steps that never gave what the check needs.

    ``unknown`` with why, per GPU if known; ``failed`` if the worker died, hung or gave up.
    """
    if report.failure is not None:
        return [_failed(report, name, expected)]
    essential = not ESSENTIAL.isdisjoint(steps)
    told = [entry for entry in report.unmeasured if entry.step in steps]
    if told:
        return [
            Record(
                name=name,
                outcome="unknown",
                expected=expected,
                device=", ".join(f"GPU {gpu}" for gpu in entry.gpus),
                reason=f"not measured: {entry.reason}",
                remedy="free the memory of that GPU, or leave it out of CUDA_VISIBLE_DEVICES",
                essential=essential and not report.unused.issuperset(entry.gpus),
            )
            for entry in told
        ]
    problem = report.versions.problem if report.versions else None
    if not report.devices:
        why = problem or "torch sees no GPU"
    else:
        why = "the CUDA worker said nothing of it"
    return [
        Record(
            name=name,
            outcome="unknown",
            expected=expected,
            reason=f"not measured: {why}",
            # No GPU at all is a shortfall; GPUs that CUDA cannot use are broken.
            shortfall=problem is None and not report.devices,
            essential=essential,
        )
    ]


def _remedy(report: WorkerReport) -> str:
    """Before the GPUs were touched there is nothing about them to mend."""
    begun = [step.name for step in report.steps]
    return IMPORT_REMEDY if begun in ([], ["import torch"]) else WORKER_REMEDY


def with_failure(report: WorkerReport, records: Sequence[Record]) -> list[Record]:
    """A worker that died or hung fails every check that rests on it, what it left included."""
    failed = any(
        record.outcome == "failed" and record.reason == report.failure for record in records
    )
    if report.failure is None or failed:
        return [*records]
    return [*records, worker_came_through(report)]


def worker_came_through(report: WorkerReport) -> Record:
    """It ended by itself with all steps done, within its limit."""
    expected = "all steps done"
    if report.failure is None:
        return Record(
            name="CUDA worker",
            outcome="passed",
            expected=expected,
            measured=f"{len(report.steps)} steps in {report.seconds:.1f} s",
        )
    return _failed(report, "CUDA worker", expected)


def _failed(report: WorkerReport, name: str, expected: str) -> Record:
    unstarted = report.failed_step == STARTING
    path = report.failed_step in ("copies", "chains", "pair speed")
    return Record(
        name=name,
        outcome="failed",
        expected=expected,
        measured="never started"
        if unstarted
        else f"stopped at {report.failed_step or 'its start'}",
        device=(" -> " if path else ", ").join(f"GPU {gpu}" for gpu in report.failed_gpus),
        reason=report.failure or "",
        remedy=UNSTARTED_REMEDY if unstarted else _remedy(report),
    )
