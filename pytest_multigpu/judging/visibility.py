"""Judging whether NVML, the environment and CUDA agree on the GPUs. Pure.

Imports records and :mod:`.machine`.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..records.check import Record
from ..records.machine import Machine
from ..records.visibility import GpuEnvironment, Visibility
from .machine import GPU_FLAGS, label


def judge_visibility(
    machine: Machine,
    visibility: Visibility,
    environment: GpuEnvironment,
    cuda_uuids: Sequence[str] | None = None,
    cuda_problem: str | None = None,
) -> list[Record]:
    """Do NVML, the environment and CUDA agree on which GPUs there are.

    :param cuda_uuids: UUIDs in CUDA's own order; None if CUDA could not be asked.
    :param cuda_problem: why not.
    """
    return [
        *judge_environment(machine, visibility, environment),
        *judge_cuda(machine, visibility, environment, cuda_uuids, cuda_problem),
    ]


def judge_environment(
    machine: Machine, visibility: Visibility, environment: GpuEnvironment
) -> list[Record]:
    """What variables make of the GPUs that NVML lists; CUDA need not be asked."""
    records = _judge_container(machine, environment)
    return [_judge_variable(machine, visibility), *records] if machine.gpus else records


def judge_cuda(
    machine: Machine,
    visibility: Visibility,
    environment: GpuEnvironment,
    cuda_uuids: Sequence[str] | None = None,
    cuda_problem: str | None = None,
) -> list[Record]:
    """What CUDA sees, and in which order, beside what NVML and the environment say."""
    return [
        *_judge_order(visibility, environment, cuda_uuids),
        _judge_cuda(machine, visibility, cuda_uuids, cuda_problem),
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
    visibility: Visibility, environment: GpuEnvironment, cuda_uuids: Sequence[str] | None
) -> list[Record]:
    order = environment.cuda_device_order
    remedy = "export CUDA_DEVICE_ORDER=PCI_BUS_ID"
    if order not in (None, "", "PCI_BUS_ID", "FASTEST_FIRST"):
        reason = f"CUDA_DEVICE_ORDER={order} is not a value that CUDA knows"
    elif not visibility.certain_order and cuda_uuids is None:
        reason = (
            "mixed GPUs without CUDA_DEVICE_ORDER=PCI_BUS_ID: CUDA numbers the fastest first, "
            "nvidia-smi does not"
        )
    else:
        return []
    return [
        Record(
            name="GPU order",
            outcome="warned",
            expected="PCI_BUS_ID",
            measured=order or "not set",
            reason=reason,
            remedy=remedy,
        )
    ]


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


def _judge_cuda(
    machine: Machine,
    visibility: Visibility,
    cuda_uuids: Sequence[str] | None,
    problem: str | None,
) -> Record:
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
    if wanted != seen:
        # Cards of one model may change places; with mixed ones the plan is for other cards.
        return Record(
            name=name,
            outcome="warned" if visibility.certain_order else "failed",
            expected="the order of nvidia-smi",
            measured="another order",
            reason="CUDA numbers the GPUs differently from nvidia-smi"
            + ("" if visibility.certain_order else ", which the plan followed"),
            remedy="export CUDA_DEVICE_ORDER=PCI_BUS_ID",
        )
    return Record(name=name, outcome="passed", expected=expected, measured=len(seen), unit="GPUs")


def _bare(uuid: str) -> str:
    return uuid.removeprefix("GPU-").lower()
