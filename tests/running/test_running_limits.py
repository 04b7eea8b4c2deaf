"""Limits on a test's memory: torch's peaks within one another, and whose bytes NVML sees."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from typing import Any

import pytest

from pytest_multigpu.model import growth, loading, memory, witness
from pytest_multigpu.model.growth import GrowthMeter
from pytest_multigpu.model.memory import LeakMeter, PeakMeter
from pytest_multigpu.model.torch_peaks import TorchPeaks
from pytest_multigpu.model.witness import Shares, Witness
from pytest_multigpu.records.memory import Growth, Leftover
from pytest_multigpu.units import GIB

NO_PROCESS = 4_000_000


class Gpu:
    """One GPU as torch's allocator and NVML see it."""

    def __init__(self) -> None:
        self.live = self.peak = 0
        self.used: int | None = 2 * GIB
        self.processes: dict[int, int | None] = {}
        self.context = True

    def hold(self, live: int) -> None:
        self.live = live
        self.peak = max(self.peak, live)


class FakeNvmlError(Exception):
    pass


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """``cuda:0``, in place of the real one."""
    import torch

    found = Gpu()
    nvml: Any = types.ModuleType("pynvml")
    nvml.NVMLError, nvml.nvmlMemory_v2 = FakeNvmlError, 7
    nvml.nvmlInit = nvml.nvmlShutdown = lambda: None
    nvml.nvmlDeviceGetHandleByUUID = lambda uuid: uuid

    def info(_handle: str, version: int | None = None) -> Any:
        if found.used is None:
            raise FakeNvmlError
        return types.SimpleNamespace(used=found.used)

    nvml.nvmlDeviceGetMemoryInfo = info
    nvml.nvmlDeviceGetComputeRunningProcesses = lambda _handle: [
        types.SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in found.processes.items()
    ]
    nvml.nvmlDeviceGetGraphicsRunningProcesses = lambda _handle: []
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    for module in (memory, witness, growth):
        monkeypatch.setattr(module, "cuda_ready", lambda: True)
    for module in (memory, growth):
        monkeypatch.setattr(module, "allocated_bytes", lambda _device: found.live)
        monkeypatch.setattr(module, "has_context", lambda _index: found.context)
    monkeypatch.setattr(witness, "INTERVAL_SECONDS", 0.001)

    def reset(_index: int) -> None:
        found.peak = found.live

    cuda = torch.cuda
    monkeypatch.setattr(
        cuda, "get_device_properties", lambda _index: types.SimpleNamespace(uuid="aaa")
    )
    monkeypatch.setattr(cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(cuda, "max_memory_allocated", lambda _index: found.peak)
    monkeypatch.setattr(cuda, "max_memory_reserved", lambda _index: found.peak + 1)
    return found


@pytest.fixture
def child() -> Iterator[int]:
    """A process that this one started."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process.pid
    process.communicate(b"\n")


def test_an_outer_peak_survives_a_phase_within_it(gpu: Gpu) -> None:
    meter = PeakMeter(("cuda:0",))
    with meter.measure("outer") as outer:
        gpu.hold(30)
        gpu.hold(5)
        with PeakMeter(("cuda:0",)).measure("inner") as inner:
            gpu.hold(9)
            gpu.hold(1)
        gpu.hold(7)
    assert [(r.allocated_bytes, r.reserved_bytes) for r in inner.peaks.readings] == [(9, 10)]
    assert [(r.allocated_bytes, r.reserved_bytes) for r in outer.peaks.readings] == [(30, 31)]
    with meter.measure("after") as after:
        gpu.hold(8)
    assert after.peaks.readings[0].allocated_bytes == 8


def test_a_peak_within_counts_for_the_outer_one_too(gpu: Gpu) -> None:
    meter = PeakMeter(("cuda:0",))
    with meter.measure("outer") as outer:
        with meter.measure("first"):
            gpu.hold(9)
            gpu.hold(0)
        with meter.measure("second"):
            gpu.hold(4)
            gpu.hold(0)
    assert outer.peaks.readings[0].allocated_bytes == 9


def test_a_phase_within_that_raises_keeps_the_outer_peak(gpu: Gpu) -> None:
    meter = PeakMeter(("cuda:0",))
    with meter.measure("outer") as outer:
        with pytest.raises(KeyError), meter.measure("inner"):  # noqa: PT012
            gpu.hold(9)
            raise KeyError
        gpu.hold(1)
    assert outer.peaks.readings[0].allocated_bytes == 9
    assert [phase.phase for phase in meter.phases] == ["inner", "outer"]


def test_a_model_that_is_loaded_meanwhile_loses_nothing(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    for name, answer in (("is_available", True), ("is_initialized", True), ("device_count", 1)):
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)
    peaks = TorchPeaks([0])
    gpu.hold(9)
    gpu.hold(0)
    loading._reset_peaks()
    assert gpu.peak == 0
    assert peaks.close() == {0: (9, 10)}


def test_whose_bytes(gpu: Gpu, child: int) -> None:
    gpu.used = 100
    gpu.processes = {os.getpid(): 10, child: 20, os.getppid(): 30, NO_PROCESS: 15}
    shares = Witness(("cuda:0",)).shares("cuda:0")
    # What NVML lists under a number that is no process here may be ours: it is counted.
    assert shares == Shares(used_bytes=100, others_bytes=30, hidden_bytes=40)
    assert shares.mine_bytes == 70


def test_a_process_that_lost_its_parent_stays_whose_it_was(gpu: Gpu) -> None:
    gpu.used = 100
    watching = Witness(("cuda:0",))
    starts = (
        "import subprocess as s\n"
        "print(s.Popen(['sleep', '60'], stdout=s.DEVNULL).pid, flush=True)\n"
        "input()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", starts], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    orphan = int(parent.stdout.readline())
    try:
        gpu.processes = {orphan: 60}
        assert watching.shares("cuda:0") == Shares(used_bytes=100, others_bytes=0, hidden_bytes=40)
        parent.communicate(b"\n")
        assert watching.shares("cuda:0") == Shares(used_bytes=100, others_bytes=0, hidden_bytes=40)
        fresh = Witness(("cuda:0",)).shares("cuda:0")
        assert fresh == Shares(used_bytes=100, others_bytes=60, hidden_bytes=40)
    finally:
        os.kill(orphan, 9)


def test_a_gpu_that_nvml_cannot_read_has_no_shares(gpu: Gpu) -> None:
    gpu.used = None
    assert Witness(("cuda:0",)).shares("cuda:0") is None
    assert Witness(("cuda:0",)).shares("cuda:1") is None


def measured(gpu: Gpu, *steps: tuple[int, int, dict[int, int | None]]) -> Growth:
    """Each step for a moment: torch's live bytes, NVML's used, and its processes."""
    meter = GrowthMeter(Witness(("cuda:0",)))
    with meter.measure():
        for live, used, processes in steps:
            gpu.hold(live)
            gpu.used, gpu.processes = used, processes
            time.sleep(0.05)
    (found,) = meter.growths
    return found


def test_growth_of_what_torch_does_not_know(gpu: Gpu) -> None:
    gpu.hold(100)
    gpu.used = 2 * GIB
    found = measured(gpu, (130, 5 * GIB, {}), (110, 2 * GIB, {}))
    assert found == Growth(
        device="cuda:0",
        live_bytes=100,
        had_context=True,
        torch_bytes=130,
        grown_bytes=3 * GIB,
        hidden_bytes=5 * GIB,
    )


def test_what_others_take_meanwhile_is_not_the_tests(gpu: Gpu) -> None:
    other = os.getppid()
    gpu.used, gpu.processes = 10 * GIB, {other: 8 * GIB, os.getpid(): 2 * GIB}
    found = measured(
        gpu,
        (0, 40 * GIB, {other: 38 * GIB, os.getpid(): 2 * GIB}),
        (0, 7 * GIB, {other: 2 * GIB, os.getpid(): 5 * GIB}),
    )
    assert (found.grown_bytes, found.hidden_bytes) == (3 * GIB, 0)


def test_a_gpu_that_is_not_read_has_no_growth(gpu: Gpu) -> None:
    gpu.used = None
    assert measured(gpu).grown_bytes is None


def test_a_torch_that_cannot_use_the_gpus_has_no_peak(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (memory, witness, growth):
        monkeypatch.setattr(module, "cuda_ready", lambda: False)
    found = measured(gpu)
    assert (found.torch_bytes, found.grown_bytes) == (None, None)
    (left,) = LeakMeter(Witness(("cuda:0",))).leftover()
    assert (left.by_torch, left.used_left_bytes) == (False, None)


def test_leftovers_by_nvml_leave_others_out(gpu: Gpu, child: int) -> None:
    other = os.getppid()
    gpu.used, gpu.processes = 10 * GIB, {other: 8 * GIB, os.getpid(): 2 * GIB}
    meter = LeakMeter(Witness(("cuda:0",)))
    gpu.used, gpu.processes = 25 * GIB, {other: 20 * GIB, os.getpid(): 2 * GIB, child: 3 * GIB}
    assert meter.leftover() == (
        Leftover(
            device="cuda:0",
            before_bytes=0,
            after_bytes=0,
            used_before_bytes=2 * GIB,
            used_after_bytes=5 * GIB,
        ),
    )


def test_without_a_driver_there_is_no_context() -> None:
    import ctypes

    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        assert not witness.has_context(0)
    else:
        pytest.skip("there is a driver here")
