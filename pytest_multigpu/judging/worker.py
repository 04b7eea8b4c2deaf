"""Did the CUDA worker come through, and what is said of what it left unmeasured.

Pure: records in, records out.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..records.check import Record
from ..records.worker import WorkerReport

WORKER_REMEDY = (
    "look for Xid errors with `dmesg | grep -i xid`, reset the named GPU with "
    "`nvidia-smi --gpu-reset -i N`, or rent another machine"
)

IMPORT_REMEDY = (
    "`python -c 'import torch'` in an empty folder must work: if it does not, reinstall torch; if "
    "it does, look for files on PYTHONPATH that are named like modules of Python or torch"
)


def gpu_path(gpus: Sequence[int]) -> str:
    """``GPU 0 -> GPU 1``."""
    return " -> ".join(f"GPU {gpu}" for gpu in gpus)


def not_measured(report: WorkerReport, name: str, expected: str, *steps: str) -> list[Record]:
    """Unknown records for steps that never gave what the check needs: why, per GPU if known."""
    told = [entry for entry in report.unmeasured if entry.step in steps]
    if told and report.failure is None:
        return [
            Record(
                name=name,
                outcome="unknown",
                expected=expected,
                device=", ".join(f"GPU {gpu}" for gpu in entry.gpus),
                reason=f"not measured: {entry.reason}",
                remedy="free the memory of that GPU, or leave it out of CUDA_VISIBLE_DEVICES",
            )
            for entry in told
        ]
    problem = report.versions.problem if report.versions else None
    if report.failure is not None:
        why = report.failure
    elif not report.devices:
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
            shortfall=report.failure is None and problem is None and not report.devices,
        )
    ]


def _remedy(report: WorkerReport) -> str:
    """Before the GPUs were touched there is nothing about them to mend."""
    begun = [step.name for step in report.steps]
    return IMPORT_REMEDY if begun in ([], ["import torch"]) else WORKER_REMEDY


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
    return Record(
        name="CUDA worker",
        outcome="failed",
        expected=expected,
        measured=f"stopped at {report.failed_step or 'its start'}",
        device=", ".join(f"GPU {gpu}" for gpu in report.failed_gpus),
        reason=report.failure,
        remedy=_remedy(report),
    )
