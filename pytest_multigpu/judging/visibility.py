"""Judging whether NVML, the environment and CUDA agree on the GPUs. Pure.

Imports records and :mod:`.machine`.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..records.check import Record
from ..records.machine import Machine
from ..records.visibility import GpuEnvironment, Visibility
from .machine import GPU_FLAGS, label

BY_BUS = "export CUDA_DEVICE_ORDER=PCI_BUS_ID"
"""CUDA, torch's own reading of NVML and nvidia-smi then number the GPUs alike."""


def judge_environment(
    machine: Machine, visibility: Visibility, environment: GpuEnvironment
) -> list[Record]:
    """What variables make of the GPUs that NVML lists; CUDA need not be asked."""
    records = _judge_container(machine, environment)
    if not machine.gpus:
        return records
    return [
        _judge_variable(machine, visibility),
        *_judge_order(machine, visibility, environment),
        *records,
        *_judge_left_over(environment),
    ]


def _judge_variable(machine: Machine, visibility: Visibility) -> Record:
    name, total = "visible GPUs", len(machine.gpus)
    shown = f"{len(visibility.visible)} of {total}"
    value = "CUDA_VISIBLE_DEVICES" + ("" if visibility.value is None else f"={visibility.value}")
    if visibility.form == "empty":
        reason = f"CUDA_VISIBLE_DEVICES is empty, which hides {_all(total)}"
    elif visibility.faults:
        reason = f"{value}: {'; '.join(visibility.faults)}"
    elif not visibility.visible and total:
        reason = f"{value} leaves no GPU visible"
    elif visibility.notes:
        return Record(
            name=name,
            outcome="warned",
            expected="GPU indices or UUIDs",
            measured=shown,
            reason=f"{value}: {'; '.join(visibility.notes)}",
            remedy=visibility.mend,
        )
    else:
        return Record(name=name, outcome="passed", expected="at least 1", measured=shown)
    return Record(
        name=name,
        outcome="failed",
        expected="every GPU that CUDA_VISIBLE_DEVICES names",
        measured=shown,
        reason=reason,
        remedy=visibility.mend or "unset CUDA_VISIBLE_DEVICES",
    )


def _all(total: int) -> str:
    return "the only GPU" if total == 1 else f"all {total} GPUs"


def _judge_order(
    machine: Machine, visibility: Visibility, environment: GpuEnvironment
) -> list[Record]:
    """Of mixed cards without CUDA's own word the plan may be for the wrong ones. Any value but two,
    an empty one too, makes CUDA end with error 101 (tried on driver 580)."""
    order = environment.cuda_device_order
    if order not in (None, "PCI_BUS_ID", "FASTEST_FIRST"):
        reason = f"CUDA_DEVICE_ORDER={order} is no value that CUDA knows, and it does not start"
    elif machine.order_problem is not None:
        reason = order_unknown(machine.order_problem)
    elif not visibility.certain_order:
        return [Record(name="GPU order", outcome="passed", expected="CUDA's own", measured="known")]
    else:
        return []
    return [
        Record(
            name="GPU order",
            outcome="failed",
            expected="PCI_BUS_ID",
            measured="not set" if order is None else order,
            reason=reason,
            remedy=BY_BUS,
        )
    ]


def order_unknown(problem: str) -> str:
    """:param problem: ``Machine.order_problem``."""
    return (
        f"mixed GPUs, which CUDA numbers by speed, and CUDA {problem}: "
        "the plan may be for other cards"
    )


def _judge_container(machine: Machine, environment: GpuEnvironment) -> list[Record]:
    """What the container or the pod was promised against what NVML lists."""
    found, records = len(machine.gpus), []
    asked = environment.nvidia_visible_devices
    entries = [entry.strip() for entry in (asked or "").split(",") if entry.strip()]
    if asked is not None and asked.strip() not in ("", "all", "none", "void"):
        lost = [
            entry
            for entry in entries
            if entry.startswith("GPU-")
            and not any(gpu.uuid.startswith(entry) for gpu in machine.gpus)
        ]
        if lost or len(entries) > found:
            what = f"{lost[0]} is not there" if lost else f"{len(entries)} GPUs asked for"
            records.append(
                Record(
                    name="container's GPUs",
                    outcome="failed",
                    expected=len(entries),
                    measured=found,
                    unit="GPUs",
                    reason=f"NVIDIA_VISIBLE_DEVICES={asked}: {what}, NVML lists {found}",
                    remedy=f"start the container anew: {GPU_FLAGS}",
                    shortfall=True,
                )
            )
    promised = environment.runpod_gpu_count
    if promised is not None and promised.isdecimal() and int(promised) != found:
        records.append(
            Record(
                name="pod's GPUs",
                outcome="failed" if int(promised) > found else "warned",
                expected=int(promised),
                measured=found,
                unit="GPUs",
                reason=f"RUNPOD_GPU_COUNT={promised}, but NVML lists {found}",
                remedy="runpodctl stop pod $RUNPOD_POD_ID && runpodctl start pod $RUNPOD_POD_ID",
                shortfall=int(promised) > found,
            )
        )
    files = environment.device_files
    if files is not None and files > found > 0:
        records.append(
            Record(
                name="device files",
                outcome="warned",
                expected=files,
                measured=found,
                unit="GPUs",
                reason=f"/dev has {files} NVIDIA GPUs, but NVML lists {found}",
                remedy="nvidia-smi -L lists what is left; if one is gone, reboot or rent another",
            )
        )
    return records


def _judge_left_over(environment: GpuEnvironment) -> list[Record]:
    """Variables for finding errors that were forgotten: all runs, slower or with less memory."""
    found = []
    if (environment.cuda_launch_blocking or "0").strip() not in ("", "0"):
        found.append(
            Record(
                name="CUDA_LAUNCH_BLOCKING",
                outcome="warned",
                expected="not set",
                measured=environment.cuda_launch_blocking,
                reason="Python waits for every kernel to end before it launches the next",
                remedy="unset CUDA_LAUNCH_BLOCKING",
            )
        )
    if (environment.cuda_module_loading or "").strip().upper() == "EAGER":
        found.append(
            Record(
                name="CUDA_MODULE_LOADING",
                outcome="warned",
                expected="LAZY",
                measured=environment.cuda_module_loading,
                reason="every kernel of every library is loaded into each context: "
                "memory that the plan does not count",
                remedy="unset CUDA_MODULE_LOADING",
            )
        )
    return found


def judge_cuda(
    machine: Machine,
    visibility: Visibility,
    cuda_uuids: Sequence[str] | None,
    problem: str | None = None,
) -> Record:
    """Does CUDA see the GPUs that NVML and the environment leave visible, in that order.

    :param cuda_uuids: UUIDs in CUDA's own order; None if CUDA could not be asked.
    :param problem: why not.
    """
    name = "GPUs that CUDA sees"
    expected = len(visibility.visible)
    if cuda_uuids is None:
        return Record(
            name=name,
            outcome="unknown",
            expected=expected,
            unit="GPUs",
            reason=problem or "CUDA was not asked",
            remedy="run the interconnect check: it starts the CUDA worker",
        )
    by_index = {gpu.index: gpu for gpu in machine.gpus}
    wanted = [_bare(by_index[index].uuid) for index in visibility.visible]
    seen = [_bare(uuid) for uuid in cuda_uuids]
    lost = [label(by_index[i]) for i in visibility.visible if _bare(by_index[i].uuid) not in seen]
    extra = [uuid for uuid in cuda_uuids if _bare(uuid) not in wanted]
    if lost or extra:
        differences = []
        if lost:
            differences.append(f"CUDA does not see {', '.join(lost)}")
        if extra:
            differences.append(f"CUDA sees {', '.join(extra)}, which NVML does not show as visible")
        return Record(
            name=name,
            outcome="failed",
            expected=expected,
            measured=len(seen),
            unit="GPUs",
            reason="; ".join(differences),
            remedy="unset CUDA_VISIBLE_DEVICES; if that changes nothing, reboot or rent another",
        )
    if wanted != seen and not visibility.certain_order:
        return Record(
            name=name,
            outcome="failed",
            expected="the plan's order",
            measured="another order",
            reason="CUDA numbers mixed GPUs otherwise than the plan, which is for other cards",
            remedy=BY_BUS,
        )
    if wanted != seen:
        return Record(
            name=name,
            outcome="warned",
            expected="the order of nvidia-smi",
            measured="another order",
            reason="CUDA numbers the GPUs differently from nvidia-smi: copies and speeds name "
            "them by CUDA's numbers, VRAM and health by nvidia-smi's",
            remedy=BY_BUS,
        )
    return Record(name=name, outcome="passed", expected=expected, measured=len(seen), unit="GPUs")


def _bare(uuid: str) -> str:
    return uuid.removeprefix("GPU-").lower()
