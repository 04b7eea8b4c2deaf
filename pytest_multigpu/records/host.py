"""The host's memory and disks, and a checkpoint's files.

Imports only the standard library.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class HostMemory:
    """Main memory as this process may use it. Every None is unknown."""

    total_bytes: int | None
    """MemTotal. Some virtual machines start small and grow."""
    available_bytes: int | None
    """MemAvailable."""
    limit_bytes: int | None = None
    """The tightest cgroup limit; None if there is none or it could not be read."""
    used_bytes: int | None = None
    """Counted against that limit, without the page cache that can be dropped."""
    shm_total_bytes: int | None = None
    """Size of /dev/shm."""
    shm_free_bytes: int | None = None

    @property
    def usable_bytes(self) -> int | None:
        """What can still be taken: the lesser of MemAvailable and the cgroup's rest."""
        rest = None
        if self.limit_bytes is not None and self.used_bytes is not None:
            rest = max(0, self.limit_bytes - self.used_bytes)
        known = [size for size in (self.available_bytes, rest) if size is not None]
        return min(known) if known else None

    @property
    def limited_by_cgroup(self) -> bool:
        """True if the cgroup, and not the machine, sets :attr:`usable_bytes`."""
        if self.limit_bytes is None or self.used_bytes is None:
            return False
        return self.usable_bytes == max(0, self.limit_bytes - self.used_bytes)


@dataclass(frozen=True, kw_only=True)
class DiskSpace:
    """Free space where checkpoints are kept."""

    path: str
    """The folder asked for; it need not exist yet."""
    mount: str
    """The nearest folder above that exists: where the space was read."""
    total_bytes: int | None = None
    free_bytes: int | None = None
    """For an unprivileged user."""
    problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class ReadSpeed:
    """A short sample of reading the checkpoint from its storage."""

    path: str
    bytes_per_second: float | None = None
    sampled_bytes: int = 0
    method: str = ""
    """How the page cache was kept out: ``O_DIRECT`` or ``page cache dropped``."""
    problem: str | None = None
    """Why it could not be measured."""


@dataclass(frozen=True, kw_only=True)
class CheckpointReport:
    """A checkpoint, checked by its files alone."""

    path: str
    fetch: str = ""
    """What mends every problem, as a command where there is one."""
    found: bool = True
    """A weight file or an index is there; False for a folder with a config.json alone."""
    pickled: bool = False
    """Its weights are ``torch.save`` files: their tensors were not checked."""
    total_bytes: int = 0
    """Size of the weight files found."""
    files: tuple[str, ...] = ()
    """Names of the weight files that the checkpoint should have, in order."""
    tensors: int = 0
    problems: tuple[str, ...] = ()
    """One sentence each, naming the file."""

    @property
    def complete(self) -> bool:
        return self.found and not self.problems
