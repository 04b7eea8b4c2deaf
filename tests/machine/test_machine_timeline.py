"""VRAM over the run: every GPU, thinned as it grows, with gaps where a GPU was lost."""

from __future__ import annotations

import time

from pytest_multigpu.machine.fake import FakeNvml
from pytest_multigpu.machine.timeline import Timeline
from pytest_multigpu.records.report import VramSample
from pytest_multigpu.units import GIB


def wait_for(timeline: Timeline, count: int) -> tuple[VramSample, ...]:
    deadline = time.monotonic() + 10
    while len(timeline.samples()) < count:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return timeline.samples()


def test_samples_by_cuda_name() -> None:
    nvml = FakeNvml(3)
    nvml.gpus[2].used, nvml.gpus[0].used = 5 * GIB, 7 * GIB
    timeline = Timeline({2: "cuda:0", 0: "cuda:1"}, interval=0.01, nvml=nvml)
    timeline.start(time.monotonic() - 100)
    wait_for(timeline, 4)
    nvml.gpus[0].used = 9 * GIB
    nvml.lose(2)
    before = len(timeline.samples())
    found = wait_for(timeline, before + 4)
    timeline.stop()
    assert {(s.device, s.used_bytes) for s in found[:4]} == {
        ("cuda:0", 5 * GIB),
        ("cuda:1", 7 * GIB),
    }
    assert found[-1].device == found[-2].device == "cuda:1"
    assert found[-1].used_bytes == 9 * GIB
    assert 100 <= found[0].seconds < 102
    assert [s.seconds for s in found] == sorted(s.seconds for s in found)
    assert len(timeline.samples()) in (len(found), len(found) + 1)


def test_a_long_run_is_thinned() -> None:
    timeline = Timeline({0: "cuda:0"}, interval=0.001, most=16, nvml=FakeNvml(1))
    timeline.start(time.monotonic())
    time.sleep(0.3)
    timeline.stop()
    found = timeline.samples()
    assert 7 <= len(found) < 16
    assert found[0].seconds < 0.1
    assert found[-1].seconds > 0.1


def test_without_nvml_there_is_nothing_to_show() -> None:
    timeline = Timeline({0: "cuda:0"}, nvml=FakeNvml(1, errors={"nvmlInit": 12}))
    timeline.start(time.monotonic())
    timeline.stop()
    assert timeline.samples() == ()
