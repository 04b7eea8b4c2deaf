"""Did the CUDA worker come through, and does it see the machine that NVML shows?

Pure: records in, records out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..records.check import Record
from ..records.machine import Machine
from ..records.worker import WorkerReport

WORKER_REMEDY = (
    "look for Xid errors with `dmesg | grep -i xid`, reset the named GPU with "
    "`nvidia-smi --gpu-reset -i N`, or rent another machine"
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
                remedy="free the memory of that GPU and run again",
            )
            for entry in told
        ]
    if report.failure is not None:
        why = report.failure
    elif not report.devices:
        why = (report.versions and report.versions.problem) or "torch sees no GPU"
    else:
        why = "the CUDA worker said nothing of it"
    return [
        Record(
            name=name,
            outcome="unknown",
            expected=expected,
            reason=f"not measured: {why}",
            # No GPU at all is the machine's shortfall; the visibility check tells what is broken.
            shortfall=report.failure is None and not report.devices,
        )
    ]


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
        measured=f"stopped at {report.failed_step}",
        device=", ".join(f"GPU {gpu}" for gpu in report.failed_gpus),
        reason=report.failure,
        remedy=WORKER_REMEDY,
    )


def visibility(report: WorkerReport, machine: Machine) -> list[Record]:
    """What torch sees equals the inventory's visible GPUs, in the same order, by UUID."""
    name = "GPUs as torch sees them"
    wanted = [gpu.uuid for gpu in machine.visible_gpus]
    expected = f"{len(wanted)} GPUs, in the order of the inventory"
    problem = report.versions.problem if report.versions else None
    if problem is not None:
        return [
            Record(
                name=name,
                outcome="failed",
                expected=expected,
                measured="no CUDA",
                reason=f"torch cannot start CUDA: {problem}",
                remedy="install a torch that this driver serves: https://pytorch.org/get-started",
                shortfall=not machine.gpus and machine.problem is None,
            )
        ]
    if not report.devices and (report.failure is not None or report.versions is None):
        return not_measured(report, name, expected)
    found = [device.uuid for device in report.devices]
    if not wanted and not found:
        return [
            Record(
                name=name,
                outcome="failed",
                expected="at least 1 GPU",
                measured="0 GPUs",
                reason="neither the inventory nor torch sees a GPU",
                remedy="rent a machine with GPUs, or give this container its GPUs (--gpus all)",
                shortfall=machine.problem is None,
            )
        ]
    if not all(found):
        return [
            Record(
                name=name,
                outcome="unknown",
                expected=expected,
                measured=f"{len(found)} GPUs",
                reason="this torch does not tell the UUID of a GPU",
                remedy="pip install -U torch",
            )
        ]
    if len(found) != len(wanted):
        return [
            Record(
                name=name,
                outcome="failed",
                expected=expected,
                measured=f"{len(found)} GPUs",
                reason=f"the inventory has {len(wanted)} visible GPUs and torch sees {len(found)}",
                remedy="unset CUDA_VISIBLE_DEVICES, or name GPUs that nvidia-smi -L lists",
            )
        ]
    return [
        Record(
            name=name,
            outcome="passed" if _bare(ours) == _bare(theirs) else "failed",
            expected=ours,
            measured=theirs,
            device=f"GPU {index}",
            reason=""
            if _bare(ours) == _bare(theirs)
            else f"cuda:{index} is {theirs} for torch and {ours} in the inventory",
            remedy="" if _bare(ours) == _bare(theirs) else "export CUDA_DEVICE_ORDER=PCI_BUS_ID",
        )
        for index, (ours, theirs) in enumerate(zip(wanted, found, strict=True))
    ]


def _bare(uuid: str) -> str:
    return uuid.removeprefix("GPU-").removeprefix("MIG-").lower()


def kernels(report: WorkerReport) -> list[Record]:
    """This torch has kernels (or PTX to make them from) for every GPU's architecture."""
    name = "torch kernels for the architecture"
    if report.versions is None or not report.devices:
        return not_measured(report, name, "kernels for every GPU")
    arch_list = report.versions.arch_list
    records = []
    for device in report.devices:
        wanted = f"sm_{device.capability[0]}{device.capability[1]}"
        good = has_kernels(device.capability, arch_list)
        records.append(
            Record(
                name=name,
                outcome="passed" if good else "failed",
                expected=wanted,
                measured=" ".join(arch_list),
                device=f"GPU {device.index}",
                reason=""
                if good
                else f"torch {report.versions.torch} has no kernels for {device.name} ({wanted})",
                remedy=""
                if good
                else "install a torch built for it: https://pytorch.org/get-started",
            )
        )
    return records


def has_kernels(capability: tuple[int, int], arch_list: Sequence[str]) -> bool:
    """Binary code runs on its own major version from its minor on; PTX on anything newer.

    Source: CUDA C++ Programming Guide, "Application Compatibility". A suffix (``sm_90a``)
    binds the code to exactly that architecture.
    """
    for entry in arch_list:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", entry)
        if match is None:
            continue
        kind, major, minor, suffix = match.groups()
        built = int(major), int(minor)
        if built == capability:
            return True
        if suffix:
            continue
        if kind == "sm" and built[0] == capability[0] and built <= capability:
            return True
        if kind == "compute" and built <= capability:
            return True
    return False
