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
from dataclasses import dataclass, field, replace

from ..errors import MachineError
from ..records.machine import Gpu, Machine
from ..records.visibility import GpuEnvironment, Visibility

_ORDINAL = re.compile(r"[+-]?\d+", re.ASCII)
_VARIABLE = "CUDA_VISIBLE_DEVICES"
_UNSET = f"unset {_VARIABLE}"


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
        return Visibility(value=value, form="empty", visible=(), mend=_UNSET)
    if value.startswith("MIG-"):
        fault = f"{_VARIABLE}={value} names MIG instances, not whole GPUs"
        return Visibility(value=value, form="mig", visible=(), faults=(fault,), mend=_UNSET)
    by_uuid = value.startswith("GPU-")
    reading = _read_uuids(value, gpus) if by_uuid else _read_indices(value, gpus)
    visible = () if reading.repeated else tuple(reading.found)
    odd = bool(reading.faults or reading.notes)
    return Visibility(
        value=value,
        form="uuids" if by_uuid else "indices",
        visible=visible,
        faults=tuple(reading.faults),
        notes=tuple(reading.notes),
        mend=_mend(reading.meant, gpus, by_uuid) if odd else "",
        certain_order=by_uuid or not by_speed,
    )


@dataclass
class _Reading:
    """Entries read so far. ``meant``: every GPU that is named at all, once."""

    found: list[int] = field(default_factory=list)
    meant: list[int] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    stopped: bool = False
    repeated: bool = False

    def take(self, entry: str, index: int) -> None:
        if index not in self.meant:
            self.meant.append(index)
        if self.stopped:
            return
        if index in self.found:
            self.faults.append(f"entry {entry!r} is repeated: CUDA then sees no GPU at all")
            self.stopped = self.repeated = True
        else:
            self.found.append(index)

    def stop(self, entry: str, why: str) -> None:
        if not self.stopped:
            self.faults.append(f"entry {entry!r} {why}: CUDA stops reading there")
            self.stopped = True


def _read_indices(value: str, gpus: Sequence[Gpu]) -> _Reading:
    reading = _Reading()
    for entry in value.split(","):
        match = _ORDINAL.match(entry.strip())
        if match is None:
            reading.stop(entry, "is not a GPU index")
            continue
        position = int(match.group())
        if position < 0:
            if reading.found and not reading.stopped:  # a common way to end a list
                reading.notes.append(f"entry {entry!r} is negative: CUDA stops reading there")
                reading.stopped = True
                break
            reading.stop(entry, "is negative")
        elif position >= len(gpus):
            reading.stop(entry, "names no GPU")
        else:
            if match.end() < len(entry.strip()) and not reading.stopped:
                reading.notes.append(f"entry {entry!r} is read as {position}")
            reading.take(entry, gpus[position].index)
    return reading


def _read_uuids(value: str, gpus: Sequence[Gpu]) -> _Reading:
    reading = _Reading()
    for raw in value.split(","):
        entry = raw.strip()
        if not entry.startswith("GPU-"):
            reading.stop(raw, "is not a GPU UUID")
            continue
        matches = [gpu.index for gpu in gpus if gpu.uuid.startswith(entry)]
        if not matches:
            reading.stop(raw, "names no GPU")
        elif len(matches) > 1:
            reading.stop(raw, f"fits {len(matches)} GPUs")
        else:
            reading.take(raw, matches[0])
    return reading


def _mend(meant: Sequence[int], gpus: Sequence[Gpu], by_uuid: bool) -> str:
    if not meant:
        return _UNSET
    position = {gpu.index: str(number) for number, gpu in enumerate(gpus)}
    uuid = {gpu.index: gpu.uuid for gpu in gpus}
    return f"export {_VARIABLE}=" + ",".join((uuid if by_uuid else position)[i] for i in meant)


def visibility_of(machine: Machine, environment: GpuEnvironment) -> Visibility:
    """What the environment makes of ``machine``'s GPUs, with what is visible as it was read:
    where cards are mixed, CUDA itself was asked."""
    read = read_visibility(machine.visible_env, machine.gpus, environment.cuda_device_order)
    return replace(read, visible=machine.visible)


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
