"""Judging what NVML and the environment say. Pure: readings in, records out.

Unknown stays unknown; a failure names the GPU and what to do. Imports records and units.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ..records.check import Record
from ..records.health import FreeMemory, Holder
from ..records.machine import Gpu, Machine
from ..records.visibility import GpuEnvironment, Visibility
from ..units import GIB, gib

HELD_LIMIT = GIB
"""Memory in use before we start that is worth a word: a desktop's own stays below."""

_GPU_FLAGS = "docker run --gpus all"
_ARCHITECTURE = re.compile(r"(sm|compute)_(\d+)(\d)([af]?)")


def label(gpu: Gpu) -> str:
    """``GPU 2`` by CUDA index, with the number of nvidia-smi where that differs."""
    if gpu.cuda_index is None:
        return f"nvidia-smi GPU {gpu.index}"
    if gpu.cuda_index != gpu.index:
        return f"GPU {gpu.cuda_index} (nvidia-smi {gpu.index})"
    return f"GPU {gpu.index}"


def judge_gpus(machine: Machine) -> list[Record]:
    """Are there GPUs, can each be read, and are they of one model."""
    name = "GPUs"
    if machine.problem is not None:
        return [
            Record(
                name=name,
                outcome="failed",
                expected="GPUs that can be read",
                measured="no answer",
                reason=machine.problem,
                remedy="nvidia-smi shows what the driver says; reboot, or rent another machine",
            )
        ]
    if not machine.gpus:
        return [
            Record(
                name=name,
                outcome="failed",
                expected="at least 1",
                measured=0,
                unit="GPUs",
                reason="this machine has no NVIDIA GPU",
                remedy=f"rent a machine with GPUs; in a container: {_GPU_FLAGS}",
                shortfall=True,
            )
        ]
    records = [
        Record(
            name=name,
            outcome="failed",
            expected="readable",
            measured="not readable",
            device=label(gpu),
            reason=gpu.problem,
            remedy="reboot the machine, or rent another",
        )
        for gpu in machine.gpus
        if gpu.problem is not None
    ]
    readable = [gpu for gpu in machine.gpus if gpu.problem is None]
    if not readable:
        return records
    counts = {gpu.name: sum(other.name == gpu.name for other in readable) for gpu in readable}
    found = " + ".join(f"{count} x {model}" for model, count in counts.items())
    if len(counts) == 1:
        records.append(Record(name=name, outcome="passed", expected="readable", measured=found))
    else:
        records.append(
            Record(
                name=name,
                outcome="warned",
                expected="GPUs of one model",
                measured=found,
                reason=f"mixed GPUs: {found}; the slowest sets the pace",
                remedy="rent GPUs of one model, or choose some with CUDA_VISIBLE_DEVICES",
            )
        )
    return records


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
        _judge_variable(machine, visibility),
        *_judge_order(visibility, environment, cuda_uuids),
        *_judge_container(machine, environment),
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
                    remedy=f"start the container anew: {_GPU_FLAGS}",
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
    if wanted != seen and visibility.certain_order:
        return Record(
            name=name,
            outcome="warned",
            expected="the order of nvidia-smi",
            measured="another order",
            reason="CUDA numbers the GPUs differently from nvidia-smi",
            remedy="export CUDA_DEVICE_ORDER=PCI_BUS_ID",
        )
    return Record(name=name, outcome="passed", expected=expected, measured=len(seen), unit="GPUs")


def _bare(uuid: str) -> str:
    return uuid.removeprefix("GPU-").lower()


def judge_free_memory(
    machine: Machine,
    rows: Sequence[FreeMemory],
    needs: Mapping[int, int],
    *,
    plan_fits: bool,
    waited: float = 0.0,
) -> list[Record]:
    """Is what the plan needs free on each GPU, and does anyone else hold memory.

    A GPU that is too small for its part of the plan is the plan check's to fail; here it fails
    only for memory that somebody holds.

    :param needs: NVML index to the plan's peak bytes there.
    :param waited: seconds spent waiting for memory to clear.
    """
    by_index = {gpu.index: gpu for gpu in machine.gpus}
    return [
        _judge_free(label(by_index[row.gpu]), row, needs.get(row.gpu), plan_fits, waited)
        for row in rows
        if row.gpu in by_index
    ]


def lacks_memory(row: FreeMemory, need: int | None, *, plan_fits: bool) -> bool:
    """Waiting could help this GPU: it lacks bytes that somebody else holds."""
    if row.problem is not None:
        return False
    usable = row.total_bytes - row.reserved_bytes
    if need is not None and need <= usable and row.free_bytes < need:
        return True
    return not plan_fits and row.used_bytes > HELD_LIMIT


def _judge_free(
    device: str, row: FreeMemory, need: int | None, plan_fits: bool, waited: float
) -> Record:
    name = "free VRAM"
    if row.problem is not None:
        return Record(
            name=name,
            outcome="failed",
            expected=need,
            unit="bytes",
            device=device,
            reason=row.problem,
            remedy="reboot the machine, or rent another",
        )
    held = row.used_bytes > HELD_LIMIT
    lacks = lacks_memory(row, need, plan_fits=plan_fits)
    if not lacks and not held:
        return Record(
            name=name,
            outcome="passed",
            expected=need if need is not None and need <= row.free_bytes else None,
            measured=row.free_bytes,
            unit="bytes",
            device=device,
        )
    after = f" after waiting {waited:.0f} s" if waited >= 1 else ""
    who = describe_holders(row.holders)
    if lacks and need is not None and row.free_bytes < need:
        begin = f"{device} needs {gib(need)} free; found {gib(row.free_bytes)}{after}"
    else:
        begin = f"{device} has {gib(row.free_bytes)} of {gib(row.total_bytes)} free{after}"
    return Record(
        name=name,
        outcome="failed" if lacks else "warned",
        expected=need,
        measured=row.free_bytes,
        unit="bytes",
        device=device,
        reason=f"{begin}: {gib(row.used_bytes)} held by {who}",
        remedy=_free_up(row.holders),
    )


def describe_holders(holders: Sequence[Holder]) -> str:
    """``python (PID 123, alice, 40.0 GiB)``, largest first; or that none is visible."""
    if not holders:
        return "a holder that is not visible from here"
    return ", ".join(_describe(holder) for holder in holders)


def _describe(holder: Holder) -> str:
    details = [f"PID {holder.pid}"]
    if holder.user:
        details.append(holder.user)
    if holder.used_bytes is not None:
        details.append(gib(holder.used_bytes))
    return f"{holder.name or 'a process'} ({', '.join(details)})"


def _free_up(holders: Sequence[Holder]) -> str:
    if not holders:
        return (
            "look outside this container (fuser -v /dev/nvidia*); if nothing shows, "
            "restart the pod or rent another"
        )
    return "kill " + " ".join(str(holder.pid) for holder in holders)


def judge_driver(
    machine: Machine, torch: str | None, torch_cuda: str | None, cuda_problem: str | None = None
) -> list[Record]:
    """Can this driver serve the CUDA that this torch was built for.

    Within a major version any driver serves any CUDA (CUDA minor version compatibility).

    :param torch: version of the installed torch; None if there is none.
    :param torch_cuda: ``12.8``; None for a CPU build.
    :param cuda_problem: why CUDA could not be initialised, if it was tried.
    """
    name = "driver and torch"
    if torch is None:
        reason = "torch is not installed"
    elif torch_cuda is None:
        reason = f"torch {torch} is a CPU build: it cannot use the GPUs"
    elif machine.cuda is None:
        return [
            Record(
                name=name,
                outcome="unknown",
                expected=f"CUDA {torch_cuda}",
                reason="the driver does not tell which CUDA it serves",
                remedy="nvidia-smi",
            )
        ]
    elif int(machine.cuda.split(".")[0]) < int(torch_cuda.split(".")[0]):
        reason = (
            f"driver {machine.driver or 'of unknown version'} serves CUDA {machine.cuda}; "
            f"torch {torch} needs {torch_cuda}"
        )
    elif cuda_problem is not None:
        return [
            Record(
                name=name,
                outcome="failed",
                expected=f"CUDA {torch_cuda}",
                measured="CUDA does not start",
                reason=f"CUDA could not be initialised: {cuda_problem}",
                remedy=_start_cuda(cuda_problem),
            )
        ]
    else:
        return [
            Record(
                name=name,
                outcome="passed",
                expected=f"CUDA {torch_cuda} (torch {torch})",
                measured=f"CUDA {machine.cuda} (driver {machine.driver or 'unknown'})",
            )
        ]
    return [
        Record(
            name=name,
            outcome="failed",
            expected="a torch that this driver can serve",
            measured=f"torch {torch}" if torch else "no torch",
            reason=reason,
            remedy=_install_torch(machine.cuda),
        )
    ]


def _install_torch(driver_cuda: str | None) -> str:
    major = int(driver_cuda.split(".")[0]) if driver_cuda else 12
    if major < 12:
        return "rent a machine with a newer driver (CUDA 12 or later)"
    build = "cu130" if major >= 13 else "cu126"
    return (
        f"pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/{build}"
    )


def _start_cuda(problem: str) -> str:
    if "802" in problem or "not yet initialized" in problem:
        return "systemctl start nvidia-fabricmanager; in a container ask the host, or rent another"
    return "reboot the machine, or rent another"


def judge_architectures(machine: Machine, arch_list: Sequence[str]) -> list[Record]:
    """Has this torch kernels for every visible GPU.

    Code for sm_XY runs on every X.Z with Z >= Y; ``a`` builds on that card only; PTX
    (compute_XY) is compiled for anything newer. Source: CUDA C++ Programming Guide,
    "Compute Capability" and "PTX Compatibility".

    :param arch_list: ``torch.cuda.get_arch_list()``; empty if it could not be asked.
    """
    name = "kernels for this GPU"
    shipped = ", ".join(arch_list)
    records, served = [], []
    for gpu in machine.visible_gpus:
        if gpu.problem is not None:
            continue
        if not arch_list or gpu.capability is None:
            why = "the GPU's compute capability" if arch_list else "what torch was compiled for"
            records.append(
                Record(
                    name=name,
                    outcome="unknown",
                    device=label(gpu),
                    reason=f"{label(gpu)}: {why} could not be read",
                    remedy='python -c "import torch; print(torch.cuda.get_arch_list())"',
                )
            )
        elif any(_serves(architecture, gpu.capability) for architecture in arch_list):
            served.append(gpu)
        else:
            own = "sm_{}{}".format(*gpu.capability)
            records.append(
                Record(
                    name=name,
                    outcome="failed",
                    expected=own,
                    measured=shipped,
                    device=label(gpu),
                    reason=f"{label(gpu)} ({gpu.name}) is {own}; this torch has {shipped}",
                    remedy=_install_torch(machine.cuda),
                )
            )
    if served:
        own = ", ".join(sorted({"sm_{}{}".format(*g.capability) for g in served if g.capability}))
        records.append(Record(name=name, outcome="passed", expected=own, measured=shipped))
    return records


def _serves(architecture: str, capability: tuple[int, int]) -> bool:
    match = _ARCHITECTURE.fullmatch(architecture)
    if match is None:
        return False
    kind, built, suffix = match[1], (int(match[2]), int(match[3])), match[4]
    if suffix == "a":
        return built == capability
    if kind == "compute":
        return built <= capability if not suffix else built[0] == capability[0]
    return built[0] == capability[0] and built[1] <= capability[1]
