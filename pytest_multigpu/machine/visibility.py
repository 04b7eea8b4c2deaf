"""CUDA_VISIBLE_DEVICES, read as the CUDA runtime reads it, against NVML's rows. Pure.

The rules: entries up to the first that is not valid; an entry is an index or a unique prefix of a
GPU's UUID, as the first entry is; repeating a device leaves none. Source: CUDA C++ Programming
Guide, "CUDA Environment Variables"; what it leaves open was tried on driver 580: blanks may stand
around an index and not around a UUID, whose case and hyphens do not matter; what follows an index's
digits or a whole UUID is ignored; an empty entry is not valid.

Imports errors and records.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..errors import MachineError
from ..records.machine import Gpu, Machine
from ..records.visibility import GpuEnvironment, Visibility

_ORDINAL = re.compile(r"[+-]?\d+", re.ASCII)
_SEPARATORS = "; \t:|/."
"""What people write between indices, beside the comma. CUDA reads a number up to any of them."""
_ONLY_COMMAS = "CUDA knows only commas between GPUs"
_UUID_LENGTH = len("GPU-00000000-0000-0000-0000-000000000000")
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
    # A card that cannot be read has no name that would tell it from its siblings.
    mixed = len({gpu.name for gpu in gpus if gpu.problem is None}) > 1
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

    def mean(self, indices: Iterable[int]) -> None:
        self.meant += [index for index in dict.fromkeys(indices) if index not in self.meant]

    def take(self, entry: str, index: int) -> None:
        self.mean([index])
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
    for entry in _entries(value, reading):
        match = _ORDINAL.match(entry.strip())
        if match is None:
            reading.stop(entry, "is not a GPU index" if entry.strip() else "is empty")
            continue
        position = int(match.group())
        others = _others(entry.strip()[match.end() :], position)
        if position < 0:
            if reading.found and not reading.stopped:  # a common way to end a list
                reading.notes.append(f"entry {entry!r} is negative: CUDA stops reading there")
                reading.stopped = True
                break
            reading.stop(entry, "is negative")
        elif position >= len(gpus):
            reading.stop(entry, "names no GPU")
        else:
            if others and not reading.stopped:
                reading.faults.append(f"entry {entry!r} is read as {position}: {_ONLY_COMMAS}")
            elif match.end() < len(entry.strip()) and not reading.stopped:
                reading.notes.append(f"entry {entry!r} is read as {position}")
            reading.take(entry, gpus[position].index)
        reading.mean(gpus[other].index for other in others if 0 <= other < len(gpus))
    return reading


def _read_uuids(value: str, gpus: Sequence[Gpu]) -> _Reading:
    reading = _Reading()
    for entry in _entries(value, reading):
        named = [_begin_with(part, gpus) for part in re.findall(r"GPU-[\w-]+", entry)]
        matches = _begin_with(entry[:_UUID_LENGTH], gpus)
        rest = entry[_UUID_LENGTH:]
        if not entry.startswith("GPU-"):
            reading.stop(entry, "is not a GPU UUID" if entry.strip() else "is empty")
        elif not matches:
            reading.stop(entry, "names no GPU")
        elif len(matches) > 1:
            reading.stop(entry, f"fits {len(matches)} GPUs")
        else:
            if rest and not reading.stopped:
                read = f"entry {entry!r} is read as {entry[:_UUID_LENGTH]}"
                if "GPU-" in rest:
                    reading.faults.append(f"{read}: {_ONLY_COMMAS}")
                else:
                    reading.notes.append(read)
            reading.take(entry, matches[0])
        for found in named:
            reading.mean(found if len(found) == 1 else ())
    return reading


def _entries(value: str, reading: _Reading) -> Iterator[str]:
    """Between the commas. What is left empty after the last one changes nothing: CUDA stops there,
    where the list ends anyway."""
    entries = value.split(",")
    while len(entries) > 1 and not entries[-1].strip():
        entries.pop()
        reading.notes = ["the list ends with a comma"]
    yield from entries


def _others(rest: str, first: int) -> list[int]:
    """What else ``0;1``, ``0 1`` or ``0-2`` (0 to 2) means to people, by what follows the 0."""
    span = re.fullmatch(r"\s*-\s*(\d{1,4})", rest)
    if span is not None:
        return list(range(first + 1, int(span[1]) + 1))
    return [int(number) for number in re.findall(r"\d{1,4}", rest) if rest[0] in _SEPARATORS]


def _begin_with(prefix: str, gpus: Sequence[Gpu]) -> list[int]:
    wanted = _digits(prefix)
    return [gpu.index for gpu in gpus if wanted and _digits(gpu.uuid).startswith(wanted)]


def _digits(uuid: str) -> str:
    return uuid.removeprefix("GPU-").replace("-", "").lower()


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
    :raises MachineError: CUDA reports a GPU that NVML does not list; the end of a sentence.
    """
    by_uuid = {bare_uuid(gpu.uuid): gpu.index for gpu in machine.gpus if gpu.uuid}
    visible: list[int] = []
    for position, uuid in enumerate(cuda_uuids):
        index = by_uuid.get(bare_uuid(uuid))
        if index is None:
            raise MachineError(
                f"reports cuda:{position} as {uuid}, which is none of the GPUs that NVML lists"
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
        cuda_launch_blocking=environ.get("CUDA_LAUNCH_BLOCKING"),
        cuda_module_loading=environ.get("CUDA_MODULE_LOADING"),
        device_files=count_device_files(),
    )


def count_device_files() -> int:
    """Number of ``/dev/nvidia<N>`` files: GPUs that the kernel driver was given."""
    return len(glob.glob("/dev/nvidia[0-9]*"))
