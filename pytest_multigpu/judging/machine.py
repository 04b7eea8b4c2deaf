"""Judging the inventory: are there GPUs, and can each be read. Pure: readings in, records out.

Imports records.
"""

from __future__ import annotations

from ..records.check import Record
from ..records.machine import Gpu, Machine

GPU_FLAGS = "docker run --gpus all"
REBOOT = "reboot the machine, or rent another"


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
                remedy=f"rent a machine with GPUs; in a container: {GPU_FLAGS}",
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
            remedy=gpu.remedy or REBOOT,
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
