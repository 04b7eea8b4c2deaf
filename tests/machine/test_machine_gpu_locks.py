"""GPU locks between real processes: exclusive, all or none, and gone with whoever held them."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from pytest_multigpu.errors import MachineError
from pytest_multigpu.machine.gpu_locks import GpuLocks, lock_folder

UUIDS = ("GPU-a", "GPU-b", "GPU-c")
HOLD = """
import sys, time
from pathlib import Path
from pytest_multigpu.machine.gpu_locks import GpuLocks
locks = GpuLocks(Path(sys.argv[1]))
print(*locks.acquire(sys.argv[3:], int(sys.argv[2]), 10), flush=True)
time.sleep(60)
"""


def holder(folder: Path, count: int, *uuids: str) -> tuple[subprocess.Popen[str], list[str]]:
    """A process that holds GPUs, and which."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), str(count), *uuids],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, process.stdout.readline().split()


def test_each_holder_gets_another_gpu_until_none_is_left(tmp_path: Path) -> None:
    holders = [GpuLocks(tmp_path) for _ in range(3)]
    assert [locks.acquire(UUIDS, 1, 0) for locks in holders] == [(uuid,) for uuid in UUIDS]
    with pytest.raises(MachineError) as caught:
        GpuLocks(tmp_path).acquire(UUIDS[:2], 1, 0)
    pid = holders[0]._path("GPU-a").read_text()
    assert str(caught.value) == (
        f"1 of 2 GPUs did not come free within 0 s: held GPU-a by process {pid}, "
        f"GPU-b by process {pid}; end those runs, or start fewer workers"
    )
    holders[1].release()
    assert GpuLocks(tmp_path).acquire(UUIDS, 1, 0) == ("GPU-b",)


def test_all_or_none(tmp_path: Path) -> None:
    one, two = GpuLocks(tmp_path), GpuLocks(tmp_path)
    one.acquire(UUIDS[2:], 1, 0)
    with pytest.raises(MachineError):
        two.acquire(UUIDS, 3, 0)
    assert two.held == ()
    assert two.acquire(UUIDS, 2, 0) == ("GPU-a", "GPU-b")


def test_a_process_killed_leaves_no_lock(tmp_path: Path) -> None:
    process, held = holder(tmp_path, 2, *UUIDS)
    assert held == ["GPU-a", "GPU-b"]
    waits: list[str] = []
    with pytest.raises(MachineError):
        GpuLocks(tmp_path).acquire(UUIDS, 3, 0.2, on_wait=waits.append)
    assert len(waits) == 1
    assert waits[0].startswith(
        f"waiting for 3 of 3 GPUs: held GPU-a by process {process.pid}, "
        f"GPU-b by process {process.pid}, GPU-c by "
    )
    process.send_signal(signal.SIGKILL)
    started = time.monotonic()
    assert GpuLocks(tmp_path).acquire(UUIDS, 3, 10) == UUIDS
    assert time.monotonic() - started < 5
    process.communicate()


def test_a_child_does_not_inherit_the_lock(tmp_path: Path) -> None:
    locks = GpuLocks(tmp_path)
    locks.acquire(UUIDS[:1], 1, 0)
    child = subprocess.Popen(["sleep", "30"], close_fds=False)
    locks.release()
    assert GpuLocks(tmp_path).acquire(UUIDS[:1], 1, 0) == ("GPU-a",)
    child.kill()
    child.wait()


def test_another_users_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    folder = lock_folder()
    assert lock_folder() == folder
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(MachineError, match="is not a folder of this user; remove it or set TMPDIR"):
        lock_folder()
