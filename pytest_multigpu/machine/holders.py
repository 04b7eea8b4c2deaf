"""Who holds VRAM, and waiting for it to clear.

Imports errors, records and :mod:`.nvml`. Creates no CUDA context.
"""

from __future__ import annotations

import os
import pwd
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import one_line
from ..records.health import FreeMemory, Holder
from .nvml import NVML_SECONDS, NvmlLike, open_nvml, read_memory, within


def read_free(
    nvml: NvmlLike | None = None,
    indices: Sequence[int] | None = None,
    *,
    seconds: float = NVML_SECONDS,
) -> tuple[FreeMemory, ...]:
    """Memory of each GPU with the processes that NVML shows on it.

    In a container other containers' processes are not listed: memory in use then has no holder.

    :param indices: NVML indices; all GPUs unless given.
    :raises NvmlTimeoutError: the driver hangs.
    :raises Exception: ``NVMLError`` if NVML itself cannot start.
    """
    doing = ["starting NVML"]

    def work() -> tuple[FreeMemory, ...]:
        binding = open_nvml(nvml)
        asked = range(binding.nvmlDeviceGetCount()) if indices is None else indices
        rows = []
        for index in asked:
            doing.append(f"reading the memory of GPU {index}")
            rows.append(_read_one(binding, index))
        return tuple(rows)

    return within(seconds, doing, work)


def wait_for_free(
    need_bytes: Mapping[int, int],
    wait_seconds: float,
    *,
    nvml: NvmlLike | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    interval: float = 0.25,
) -> tuple[tuple[FreeMemory, ...], float]:
    """Read until every GPU has its bytes free, or ``wait_seconds`` have passed.

    It is read at least once, and once more at the end of the time.

    :param need_bytes: NVML index to bytes.
    :returns: the last reading, in the order of ``need_bytes``, and the seconds waited.
    """
    indices = tuple(need_bytes)
    start = clock()
    while True:
        rows = read_free(nvml, indices)
        waited = clock() - start
        enough = all(row.free_bytes >= need_bytes[row.gpu] for row in rows)
        if enough or waited >= wait_seconds or any(row.problem for row in rows):
            return rows, waited
        sleep(min(interval, wait_seconds - waited))


def _read_one(nvml: NvmlLike, index: int) -> FreeMemory:
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        total, free, used, reserved = read_memory(nvml, handle)
    except nvml.NVMLError as error:
        return FreeMemory(
            gpu=index,
            total_bytes=0,
            free_bytes=0,
            used_bytes=0,
            problem=f"GPU {index} cannot be read: {error}",
        )
    return FreeMemory(
        gpu=index,
        total_bytes=total,
        free_bytes=free,
        used_bytes=used,
        reserved_bytes=reserved,
        holders=_holders(nvml, handle, index),
    )


def _holders(nvml: NvmlLike, handle: Any, index: int) -> tuple[Holder, ...]:
    found: dict[int, Holder] = {}
    for function in (
        "nvmlDeviceGetComputeRunningProcesses",
        "nvmlDeviceGetGraphicsRunningProcesses",
    ):
        try:
            processes = getattr(nvml, function)(handle)
        except nvml.NVMLError:
            continue  # the driver does not tell: the memory then has no visible holder
        for process in processes:
            pid = int(process.pid)
            found.setdefault(pid, _describe(index, pid, process.usedGpuMemory))
    largest_first = sorted(found.values(), key=lambda one: (-(one.used_bytes or 0), one.pid))
    return tuple(largest_first)


def _describe(index: int, pid: int, used: int | None) -> Holder:
    return Holder(
        gpu=index,
        pid=pid,
        used_bytes=None if used is None else int(used),
        name=_name(pid),
        user=_user(pid),
    )


def _name(pid: int) -> str | None:
    """The kernel cuts it after 15 bytes, in the middle of a letter if need be."""
    try:
        name = Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return one_line(name.strip()) or None


def _user(pid: int) -> str | None:
    try:
        number = os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return None
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)
