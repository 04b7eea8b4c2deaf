"""GPUs shared out between processes of one user by file locks, one file for each UUID.

The kernel drops a lock with the process that holds it, however that process ends: no crash leaves
one behind, and a file that lies around means nothing. Imports errors.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import stat
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import MachineError

POLL_SECONDS = 0.1


def lock_folder() -> Path:
    """Where this user's lock files are, made if need be; under ``TMPDIR``.

    :raises MachineError: the folder belongs to somebody else.
    """
    folder = Path(tempfile.gettempdir(), f"pytest-multigpu-of-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise MachineError(f"{folder} is not a folder of this user; remove it or set TMPDIR")
    return folder


class GpuLocks:
    """The locks that one process holds."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = lock_folder() if folder is None else folder
        self._held: dict[str, int] = {}
        """UUID to file descriptor."""

    @property
    def held(self) -> tuple[str, ...]:
        """UUIDs, in the order asked for."""
        return tuple(self._held)

    def acquire(
        self,
        uuids: Sequence[str],
        count: int,
        seconds: float,
        *,
        on_wait: Callable[[str], None] = lambda text: None,
    ) -> tuple[str, ...]:
        """Hold ``count`` of these GPUs, all at once or none: whoever waits holds nothing.

        :param uuids: in order of preference.
        :param seconds: how long to wait in all.
        :param on_wait: told once, in a sentence, that it has to wait, and for whom.
        :returns: the UUIDs held, in the order of ``uuids``.
        :raises MachineError: not free in time; says who holds them.
        """
        deadline = time.monotonic() + seconds
        told = False
        while True:
            if self._take(uuids, count):
                return self.held
            if time.monotonic() >= deadline:
                holders = self._holders(uuids)
                raise MachineError(
                    f"{count} of {len(uuids)} GPUs did not come free within {seconds:g} s: "
                    f"{holders}; end those runs, or start fewer workers"
                )
            if not told:
                on_wait(f"waiting for {count} of {len(uuids)} GPUs: {self._holders(uuids)}")
                told = True
            # Not in step with the other waiting workers.
            time.sleep(POLL_SECONDS * random.uniform(0.5, 1.5))  # noqa: S311

    def release(self) -> None:
        for handle in self._held.values():
            os.close(handle)
        self._held.clear()

    def _take(self, uuids: Sequence[str], count: int) -> bool:
        for uuid in uuids:
            if len(self._held) == count:
                break
            handle = self._try_one(uuid)
            if handle is not None:
                self._held[uuid] = handle
        if len(self._held) == count:
            return True
        self.release()
        return False

    def _try_one(self, uuid: str) -> int | None:
        # Python's descriptors are closed on exec, so no child keeps a dead worker's lock.
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        handle = os.open(self._path(uuid), flags, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return None
        os.ftruncate(handle, 0)
        os.write(handle, str(os.getpid()).encode())
        return handle

    def _path(self, uuid: str) -> Path:
        return self._folder / f"{uuid.replace('/', '_')}.lock"

    def _holders(self, uuids: Sequence[str]) -> str:
        texts = []
        for uuid in uuids:
            pid = ""
            with contextlib.suppress(OSError):
                pid = self._path(uuid).read_text()
            texts.append(f"{uuid} by process {pid}" if pid else f"{uuid} by an unknown process")
        return "held " + ", ".join(texts)
