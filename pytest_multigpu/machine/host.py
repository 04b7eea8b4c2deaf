"""The host: memory under cgroup limits, /dev/shm, room and read speed where checkpoints are kept.

Imports records and the standard library. Linux; what another system lacks is unknown.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ..records.host import DiskSpace, HostMemory, ReadSpeed
from ..units import MIB

_NO_LIMIT = 1 << 60
"""cgroup v1 writes "no limit" as a number close to 2**63."""
_BLOCK = 8 * MIB
_THREADS = 4
MIN_SAMPLE = 16 * MIB
"""Less than this read tells nothing about the storage."""


def hub_cache(environ: Mapping[str, str]) -> Path:
    """Where huggingface_hub keeps what it downloads, by its own rules."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if environ.get(name):
            return Path(os.path.expandvars(environ[name])).expanduser()
    if environ.get("HF_HOME"):
        return Path(os.path.expandvars(environ["HF_HOME"])).expanduser() / "hub"
    home = environ.get("XDG_CACHE_HOME") or str(
        Path(environ["HOME"]) / ".cache" if environ.get("HOME") else Path.home() / ".cache"
    )
    return Path(home).expanduser() / "huggingface" / "hub"


def read_disk(path: Path) -> DiskSpace:
    """Free space at ``path``, or at the nearest folder above it that exists."""
    mount = path.absolute()
    try:
        while not mount.exists() and mount != mount.parent:
            mount = mount.parent
        space = os.statvfs(mount)
    except OSError as error:
        return DiskSpace(path=str(path), mount=str(mount), problem=f"{mount}: {error.strerror}")
    return DiskSpace(
        path=str(path),
        mount=str(mount),
        total_bytes=space.f_frsize * space.f_blocks,
        free_bytes=space.f_frsize * space.f_bavail,
    )


def read_host_memory(root: Path = Path("/")) -> HostMemory:
    """Memory as this process may use it.

    :param root: of the file system, for tests: ``proc`` and ``sys`` are read below it.
    """
    meminfo = _meminfo(root / "proc/meminfo")
    limit, used = _cgroup(root)
    total = meminfo.get("MemTotal")
    shm_total = shm_free = None
    with contextlib.suppress(OSError):
        shm = os.statvfs(root / "dev/shm")
        shm_total, shm_free = shm.f_frsize * shm.f_blocks, shm.f_frsize * shm.f_bavail
    return HostMemory(
        total_bytes=total,
        available_bytes=meminfo.get("MemAvailable"),
        limit_bytes=limit,
        used_bytes=used,
        shm_total_bytes=shm_total,
        shm_free_bytes=shm_free,
    )


def _meminfo(file: Path) -> dict[str, int]:
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return {}
    found = {}
    for line in lines:
        name, _, value = line.partition(":")
        words = value.split()
        if len(words) == 2 and words[1] == "kB" and words[0].isdigit():
            found[name] = int(words[0]) * 1024
    return found


def _cgroup(root: Path) -> tuple[int | None, int | None]:
    """The limit that leaves least, and what is used against it; version 2, then version 1."""
    found = []
    for limit_file, used_file, stat_file, cache_key in _cgroup_files(root):
        limit, used = _number(limit_file), _number(used_file)
        if limit is None or limit >= _NO_LIMIT or used is None:
            continue
        found.append((limit, max(0, used - _stat(stat_file, cache_key))))
    return min(found, key=lambda pair: pair[0] - pair[1]) if found else (None, None)


def _cgroup_files(root: Path) -> Iterable[tuple[Path, Path, Path, str]]:
    """Every level from this process's group up: any of them may set the limit."""
    v2_path, v1_path = "/", "/"
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0" and not controllers:
                v2_path = path
            elif "memory" in controllers.split(","):
                v1_path = path
    base = root / "sys/fs/cgroup"
    for group in _levels(base, v2_path):
        yield (
            group / "memory.max",
            group / "memory.current",
            group / "memory.stat",
            "inactive_file",
        )
    for group in _levels(base / "memory", v1_path):
        yield (
            group / "memory.limit_in_bytes",
            group / "memory.usage_in_bytes",
            group / "memory.stat",
            "total_inactive_file",
        )


def _levels(base: Path, path: str) -> Iterable[Path]:
    """``base``/a/b, ``base``/a, ``base``. In a container the path may not exist below base."""
    parts = [part for part in path.split("/") if part not in ("", "..")]
    for depth in range(len(parts), -1, -1):
        yield base.joinpath(*parts[:depth])


def _number(file: Path) -> int | None:
    """None for a file that is not there and for ``max``."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _stat(file: Path, key: str) -> int:
    with contextlib.suppress(OSError):
        for line in file.read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == key and value.isdigit():
                return int(value)
    return 0


def sample_read_speed(
    files: Sequence[Path],
    *,
    seconds: float = 0.5,
    max_bytes: int = 256 * MIB,
    threads: int = _THREADS,
) -> ReadSpeed:
    """Read parts of ``files`` from their storage, not from the page cache.

    ``O_DIRECT`` where the file system has it; else the pages are dropped first. Blocks of 8 MiB
    spread over the largest file, by several threads, until ``seconds`` or ``max_bytes``.
    """
    sized = []
    for file in files:
        with contextlib.suppress(OSError):
            sized.append((file.stat().st_size, file))
    if not sized:
        return ReadSpeed(path="", problem="there is no file to read")
    size, file = max(sized, key=lambda pair: pair[0])
    if size < MIN_SAMPLE:
        return ReadSpeed(
            path=str(file), problem=f"{file.name} is too small to tell ({size:,} bytes)"
        )
    sample = _Sample(file=file, size=size, seconds=seconds, max_bytes=max_bytes, threads=threads)
    direct = getattr(os, "O_DIRECT", 0)
    if direct:
        # Some file systems refuse O_DIRECT when opening, some only when reading.
        with contextlib.suppress(OSError):
            return sample.take(direct, "O_DIRECT")
    try:
        return sample.take(0, "page cache dropped")
    except OSError as error:
        return ReadSpeed(path=str(file), problem=f"{file} cannot be read: {error.strerror}")


@dataclass(frozen=True, kw_only=True)
class _Sample:
    file: Path
    size: int
    seconds: float
    max_bytes: int
    threads: int

    def take(self, flag: int, method: str) -> ReadSpeed:
        descriptor = os.open(self.file, os.O_RDONLY | flag)
        try:
            if not flag:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
            return self._read(descriptor, method)
        finally:
            os.close(descriptor)

    def _read(self, descriptor: int, method: str) -> ReadSpeed:
        blocks = min(self.size, self.max_bytes) // _BLOCK
        stride = self.size // blocks // _BLOCK * _BLOCK
        start = time.perf_counter()

        def read(worker: int) -> int:
            total = 0
            with mmap.mmap(-1, _BLOCK) as buffer:  # page-aligned, as O_DIRECT demands
                for block in range(worker, blocks, self.threads):
                    total += os.preadv(descriptor, [buffer], block * stride)
                    if time.perf_counter() - start >= self.seconds:
                        break
            return total

        with ThreadPoolExecutor(self.threads) as pool:
            sampled = sum(pool.map(read, range(self.threads)))
        elapsed = time.perf_counter() - start
        return ReadSpeed(
            path=str(self.file),
            bytes_per_second=sampled / elapsed,
            sampled_bytes=sampled,
            method=method,
        )
