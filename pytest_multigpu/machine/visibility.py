"""CUDA_VISIBLE_DEVICES, read as the CUDA runtime reads it, against NVML's rows. Pure.

The rules: entries up to the first that is not valid; an entry is an index or a unique prefix of a
GPU's UUID, as the first entry is; repeating a device leaves none. Source: CUDA C++ Programming
Guide, "CUDA Environment Variables", and PyTorch's reading of it (``torch.cuda``).

Imports errors and records.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..errors import MachineError
from ..records.machine import Gpu, Machine
from ..records.visibility import GpuEnvironment, Visibility

_ORDINAL = re.compile(r"[+-]?\d+", re.ASCII)
_VARIABLE = "CUDA_VISIBLE_DEVICES"


def read_visibility(
    value: str | None, gpus: Sequence[Gpu], device_order: str | None = None
) -> Visibility:
    """What CUDA will see.

    Cards of one model are taken to be in NVML's order (PCI). Mixed cards are too under
    ``CUDA_DEVICE_ORDER=PCI_BUS_ID``; otherwise CUDA puts the fastest first, and the order stays
    uncertain until CUDA itself is asked (:func:`join_by_uuid`).

    :param value: CUDA_VISIBLE_DEVICES; None if unset.
    """
    mixed = len({gpu.name for gpu in gpus}) > 1
    by_speed = mixed and device_order != "PCI_BUS_ID"
    if value is None:
        everything = tuple(gpu.index for gpu in gpus)
        return Visibility(value=None, form="unset", visible=everything, certain_order=not by_speed)
    if not value.strip():
        return Visibility(value=value, form="empty", visible=())
    if value.startswith("MIG-"):
        fault = f"{_VARIABLE}={value} names MIG instances, not whole GPUs"
        return Visibility(value=value, form="mig", visible=(), faults=(fault,))
    if value.startswith("GPU-"):
        visible, faults = _by_uuid(value, gpus)
        return Visibility(value=value, form="uuids", visible=visible, faults=faults)
    visible, faults = _by_index(value, gpus)
    return Visibility(
        value=value,
        form="indices",
        visible=visible,
        faults=faults,
        certain_order=not (by_speed and visible),
    )


def _by_index(value: str, gpus: Sequence[Gpu]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    found: list[int] = []
    faults: list[str] = []
    for entry in value.split(","):
        match = _ORDINAL.match(entry.strip())
        if match is None:
            faults.append(f"entry {entry!r} is not a GPU index: CUDA stops reading there")
            break
        if match.end() < len(entry.strip()):
            faults.append(f"entry {entry!r} is read as {int(match.group())}")
        position = int(match.group())
        if position < 0:
            faults.append(f"entry {entry!r} is negative: CUDA stops reading there")
            break
        if position >= len(gpus):
            faults.append(f"entry {entry!r} names no GPU: CUDA stops reading there")
            break
        if gpus[position].index in found:
            faults.append(f"entry {entry!r} is repeated: CUDA then sees no GPU at all")
            return (), tuple(faults)
        found.append(gpus[position].index)
    return tuple(found), tuple(faults)


def _by_uuid(value: str, gpus: Sequence[Gpu]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    found: list[int] = []
    for raw in value.split(","):
        entry = raw.strip()
        if not entry.startswith("GPU-"):
            return tuple(found), (f"entry {raw!r} is not a GPU UUID: CUDA stops reading there",)
        matches = [gpu.index for gpu in gpus if gpu.uuid.startswith(entry)]
        if not matches:
            return tuple(found), (f"entry {raw!r} names no GPU: CUDA stops reading there",)
        if len(matches) > 1:
            several = ", ".join(str(index) for index in matches)
            fault = f"entry {raw!r} fits GPUs {several}: CUDA stops reading there"
            return tuple(found), (fault,)
        if matches[0] in found:
            return (), (f"entry {raw!r} is repeated: CUDA then sees no GPU at all",)
        found.append(matches[0])
    return tuple(found), ()


def with_visible(machine: Machine, visible: Sequence[int]) -> Machine:
    """The machine with ``visible`` (NVML indices in CUDA order) and its rows' CUDA indices set."""
    order = {index: position for position, index in enumerate(visible)}
    gpus = tuple(replace(gpu, cuda_index=order.get(gpu.index)) for gpu in machine.gpus)
    return replace(machine, gpus=gpus, visible=tuple(visible))


def join_by_uuid(machine: Machine, cuda_uuids: Sequence[str]) -> Machine:
    """The machine in the order that CUDA itself reported.

    :param cuda_uuids: UUID of ``cuda:0``, ``cuda:1``, ...; with or without the ``GPU-`` prefix.
    :raises MachineError: CUDA reports a GPU that NVML does not list.
    """
    by_uuid = {bare_uuid(gpu.uuid): gpu.index for gpu in machine.gpus if gpu.uuid}
    visible: list[int] = []
    for position, uuid in enumerate(cuda_uuids):
        index = by_uuid.get(bare_uuid(uuid))
        if index is None:
            raise MachineError(
                f"CUDA reports cuda:{position} as {uuid}, which is none of the GPUs that NVML lists"
            )
        visible.append(index)
    return with_visible(machine, visible)


def bare_uuid(uuid: str) -> str:
    """``GPU-1A2B...`` as ``1a2b...``: torch prints UUIDs without the prefix."""
    return uuid.strip().removeprefix("GPU-").lower()


def read_environment(environ: Mapping[str, str]) -> GpuEnvironment:
    """What ``environ`` and ``/dev`` say about the GPUs."""
    return GpuEnvironment(
        cuda_visible_devices=environ.get(_VARIABLE),
        cuda_device_order=environ.get("CUDA_DEVICE_ORDER"),
        nvidia_visible_devices=environ.get("NVIDIA_VISIBLE_DEVICES"),
        runpod_gpu_count=environ.get("RUNPOD_GPU_COUNT"),
        device_files=count_device_files(),
    )


def count_device_files() -> int:
    """Number of ``/dev/nvidia<N>`` files: GPUs that the kernel driver was given."""
    return len(glob.glob("/dev/nvidia[0-9]*"))
