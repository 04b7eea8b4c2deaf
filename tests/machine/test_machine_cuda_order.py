"""CUDA's order, asked of the driver in a process of its own."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pytest_multigpu.machine import cuda_order as module
from pytest_multigpu.machine.cuda_order import cuda_order, read_uuids


class FakeLibcuda:
    """Two GPUs whose handles are 10 and 11; each function returns a CUresult."""

    def __init__(self, **codes: int) -> None:
        self.codes = codes

    def cuInit(self, flags: int) -> int:  # noqa: N802
        assert flags == 0
        return self.codes.get("init", 0)

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        ctypes.cast(count, ctypes.POINTER(ctypes.c_int))[0] = 2
        return 0

    def cuDeviceGet(self, device: Any, gpu: int) -> int:  # noqa: N802
        ctypes.cast(device, ctypes.POINTER(ctypes.c_int))[0] = gpu + 10
        return 0

    def cuDeviceGetUuid(self, raw: Any, device: Any) -> int:  # noqa: N802
        for at in range(16):
            ctypes.cast(raw, ctypes.POINTER(ctypes.c_ubyte))[at] = 16 * at + device.value - 10
        return self.codes.get("uuid", 0)


def test_uuids_are_written_as_nvml_does() -> None:
    assert read_uuids(FakeLibcuda()) == [
        "GPU-00102030-4050-6070-8090-a0b0c0d0e0f0",
        "GPU-01112131-4151-6171-8191-a1b1c1d1e1f1",
    ]


@pytest.mark.parametrize("codes", [{"init": 802}, {"uuid": 802}])
def test_a_driver_that_refuses_is_no_answer(codes: dict[str, int]) -> None:
    with pytest.raises(OSError, match=r"^CUDA error 802$"):
        read_uuids(FakeLibcuda(**codes))


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What the process runs instead."""
    path = tmp_path / "script.py"
    monkeypatch.setattr(module, "__file__", str(path))
    module._asked.cache_clear()
    yield path
    module._asked.cache_clear()


def test_the_process_has_the_given_mask_and_order(
    script: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script.write_text(
        "import os\n"
        "print(os.environ.get('CUDA_VISIBLE_DEVICES'), os.environ.get('CUDA_DEVICE_ORDER'))\n"
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert cuda_order({"CUDA_VISIBLE_DEVICES": "1,0"}) == ("1,0", "None")
    assert cuda_order({"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}) == ("None", "FASTEST_FIRST")


def test_the_same_is_asked_once(script: Path) -> None:
    counted = script.with_name("counted")
    script.write_text(f"open({str(counted)!r}, 'a').write('x')\nprint('GPU-a')\n")
    for _ in range(2):
        assert cuda_order({"CUDA_VISIBLE_DEVICES": "0", "OTHER": "1"}) == ("GPU-a",)
    assert counted.read_text() == "x"


@pytest.mark.parametrize("body", ["raise OSError", "import time\ntime.sleep(60)"])
def test_a_driver_that_fails_or_hangs_says_nothing(
    body: str, script: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script.write_text(f"print('GPU-a', flush=True)\n{body}\n")
    monkeypatch.setattr(module, "SECONDS", 0.5)
    assert cuda_order({}) is None


def test_a_machine_that_sees_no_gpu_has_an_empty_order(script: Path) -> None:
    script.write_text("print()\n")
    assert cuda_order({}) == ()


def test_the_script_needs_the_standard_library_alone() -> None:
    """It runs isolated, and ends at libcuda where there is none."""
    import subprocess

    done = subprocess.run(
        [sys.executable, "-I", "-S", str(Path(str(module.__file__)))],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0 or "libcuda.so.1" in done.stderr or "CUDA error" in done.stderr
