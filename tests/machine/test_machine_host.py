"""Host memory under cgroups, disks, the hub's cache, read speed, torch's build."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pytest_multigpu.machine.host import (
    hub_cache,
    read_disk,
    read_host_memory,
    sample_read_speed,
)
from pytest_multigpu.machine.torch_build import parse_version_file, read_torch_build
from pytest_multigpu.records.host import HostMemory
from pytest_multigpu.units import GIB, MIB


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    _write(tmp_path / "proc/meminfo", "MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\n")
    (tmp_path / "dev/shm").mkdir(parents=True)
    return tmp_path


def test_no_cgroup(root: Path) -> None:
    memory = read_host_memory(root)
    assert (memory.total_bytes, memory.available_bytes) == (16 * GIB, 8 * GIB)
    assert (memory.limit_bytes, memory.used_bytes) == (None, None)
    assert memory.usable_bytes == 8 * GIB
    assert not memory.limited_by_cgroup
    assert memory.shm_total_bytes


def test_cgroup_v2_leaves_out_the_cache_and_takes_the_tightest_level(root: Path) -> None:
    _write(root / "proc/self/cgroup", "0::/pod/box\n")
    base = root / "sys/fs/cgroup"
    _write(base / "pod/box/memory.max", "max\n")
    _write(base / "pod/box/memory.current", str(3 * GIB))
    _write(base / "pod/memory.max", str(6 * GIB))
    _write(base / "pod/memory.current", str(3 * GIB))
    _write(base / "pod/memory.stat", f"anon 1\ninactive_file {GIB}\n")
    memory = read_host_memory(root)
    assert (memory.limit_bytes, memory.used_bytes) == (6 * GIB, 2 * GIB)
    assert memory.usable_bytes == 4 * GIB
    assert memory.limited_by_cgroup


def test_cgroup_v1_and_its_way_to_say_no_limit(root: Path) -> None:
    _write(root / "proc/self/cgroup", "9:cpu,memory:/docker/x\n0::/\n")
    base = root / "sys/fs/cgroup/memory"
    _write(base / "memory.limit_in_bytes", str(5 * GIB))
    _write(base / "memory.usage_in_bytes", str(2 * GIB))
    _write(base / "memory.stat", f"total_inactive_file {GIB}\n")
    memory = read_host_memory(root)
    assert (memory.limit_bytes, memory.used_bytes) == (5 * GIB, GIB)
    _write(base / "memory.limit_in_bytes", "9223372036854771712")
    assert read_host_memory(root).limit_bytes is None


def test_nothing_readable_is_unknown(tmp_path: Path) -> None:
    assert read_host_memory(tmp_path) == HostMemory(total_bytes=None, available_bytes=None)
    assert read_host_memory(tmp_path).usable_bytes is None


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}, "/a"),
        ({"HF_HOME": "/b", "XDG_CACHE_HOME": "/c"}, "/b/hub"),
        ({"XDG_CACHE_HOME": "/c", "HOME": "/h"}, "/c/huggingface/hub"),
        ({"HOME": "/h"}, "/h/.cache/huggingface/hub"),
    ],
)
def test_the_hub_cache(environ: dict[str, str], expected: str) -> None:
    assert hub_cache(environ) == Path(expected)


def test_disk_space_is_read_where_the_path_begins(tmp_path: Path) -> None:
    disk = read_disk(tmp_path / "not" / "yet")
    space = os.statvfs(tmp_path)
    assert disk.mount == str(tmp_path)
    assert disk.total_bytes == space.f_frsize * space.f_blocks
    assert disk.free_bytes is not None


def test_disk_space_below_a_folder_that_may_not_be_entered(tmp_path: Path) -> None:
    name = "a" * 300  # any other error of the system's: tests may run as root
    disk = read_disk(tmp_path / name)
    assert disk.free_bytes is None
    assert disk.problem == f"{tmp_path / name}: File name too long"


def test_read_speed(tmp_path: Path) -> None:
    file = tmp_path / "shard"
    file.write_bytes(os.urandom(MIB) * 32)
    speed = sample_read_speed([file], seconds=5, max_bytes=32 * MIB)
    assert speed.problem is None
    assert speed.sampled_bytes == 32 * MIB
    assert speed.bytes_per_second is not None
    assert speed.bytes_per_second > 0
    assert speed.method in ("O_DIRECT", "page cache dropped")


def test_read_speed_that_cannot_be_measured(tmp_path: Path) -> None:
    assert sample_read_speed([]).problem == "there is no file to read"
    small = tmp_path / "small"
    small.write_bytes(b"x" * 100)
    assert sample_read_speed([small]).problem == "small is too small to tell (100 bytes)"


def test_torch_build_is_read_without_importing_it() -> None:
    assert parse_version_file("__version__ = '2.11.0'\ncuda: Optional[str] = '12.8'\n") == (
        "2.11.0",
        "12.8",
    )
    assert parse_version_file("__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\n") == (
        "2.13.0+cpu",
        None,
    )
    from importlib.metadata import version

    found, _cuda = read_torch_build()
    assert found is not None
    assert found.split("+")[0] == version("torch").split("+")[0]
