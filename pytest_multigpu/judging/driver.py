"""Judging whether driver, torch and GPUs fit together. Pure.

Imports records and :mod:`.machine`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..records.check import Record
from ..records.machine import Machine
from .machine import label

_ARCHITECTURE = re.compile(r"(sm|compute)_(\d+)(\d)([af]?)")


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
    if "Error 101" in problem or "invalid device ordinal" in problem:
        return "unset CUDA_DEVICE_ORDER CUDA_VISIBLE_DEVICES"  # a repeated GPU, an unknown order
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
