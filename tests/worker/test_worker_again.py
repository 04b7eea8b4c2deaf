"""Speeds that stand out are measured again: a burst of somebody else's is no fault."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence

import pytest

from pytest_multigpu.machine.cuda import again, arithmetic
from pytest_multigpu.machine.cuda.again import best_speeds
from pytest_multigpu.machine.cuda.backend import CpuBackend
from pytest_multigpu.machine.cuda.copies import CopyTest, make_pattern
from pytest_multigpu.machine.cuda.emitter import Emitter


class Gpus:
    """Speeds that come in turn for each GPU; the last one stays."""

    def __init__(self, **speeds: Sequence[float]) -> None:
        self.left = {name: list(values) for name, values in speeds.items()}
        self.asked: list[list[str]] = []
        self.told: list[tuple[str, float]] = []

    def measure(self, names: Sequence[str]) -> list[float]:
        self.asked.append(list(names))
        values = [self.left[name] for name in names]
        return [one.pop(0) if len(one) > 1 else one[0] for one in values]

    def run(self, share: float = 0.7) -> dict[str, float]:
        tell = self.told.append
        best_speeds(
            list(self.left), self.measure, lambda name, speed: tell((name, speed)), share=share
        )
        return dict(self.told)


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    slept: list[float] = []
    monkeypatch.setattr("pytest_multigpu.machine.cuda.again.time.sleep", slept.append)
    return slept


def test_what_is_even_is_measured_once(pauses: list[float]) -> None:
    gpus = Gpus(a=[50], b=[35], c=[49])
    assert gpus.run() == {"a": 50, "b": 35, "c": 49}
    assert gpus.asked == [["a", "b", "c"]]
    assert pauses == []


def test_a_burst_is_measured_away(pauses: list[float]) -> None:
    gpus = Gpus(a=[44], b=[15, 16, 44])
    assert gpus.run() == {"a": 44, "b": 44}
    assert gpus.asked == [["a", "b"], ["b"], ["b"]]
    assert pauses == [again.PAUSE_S] * 2
    # Each gain is told at once: a worker that dies leaves what it knew.
    assert gpus.told == [("a", 44), ("b", 15), ("b", 16), ("b", 44)]


def test_what_is_slow_stays_slow_and_keeps_its_best() -> None:
    gpus = Gpus(a=[50], b=[12, 11, 13, 9, 50])
    assert gpus.run() == {"a": 50, "b": 13}
    assert len(gpus.asked) == 1 + again.TURNS


def test_a_faster_turn_makes_others_doubtful() -> None:
    gpus = Gpus(a=[20, 60], b=[30, 30, 58], c=[16, 61])
    assert gpus.run() == {"a": 60, "b": 58, "c": 61}
    assert gpus.asked == [["a", "b", "c"], ["a", "c"], ["b"], ["b"]]


@pytest.mark.parametrize("speed", [0.0, 5.0])
def test_alone_there_is_nothing_to_stand_out_from(speed: float) -> None:
    gpus = Gpus(a=[speed])
    assert gpus.run() == ({"a": speed} if speed else {})
    assert gpus.asked == [["a"]]


def test_no_gpu_at_all() -> None:
    gpus = Gpus()
    assert gpus.run() == {}
    assert gpus.asked == [[]]


class Burst(CpuBackend):
    """GPU 1 takes fifty times as long as it does, in its first ``slow`` measurements."""

    def __init__(self, slow: int) -> None:
        super().__init__(2)
        self.slow = slow

    def seconds_of(self, gpu: int, work: Callable[[], None]) -> float:
        work()
        self.slow -= gpu
        return 0.05 if gpu and self.slow >= 0 else 0.001


def speeds_of(step: str, slow: int) -> dict[int, float]:
    """By GPU, or by the GPU that sends."""
    out = io.StringIO()
    backend, emitter, pattern = Burst(slow), Emitter(out), make_pattern(1 << 14)
    copies = CopyTest(backend, emitter, pattern, [0, 1])
    copies.upload(pattern.words)
    backend.slow = slow
    if step == "host speed":
        copies.host_speeds(pattern.words)
    elif step == "pair speed":
        copies.pair_speeds()
    elif step == "memory speed":
        arithmetic.memory_speeds(backend, emitter, [0, 1], 1 << 16)
    else:
        arithmetic.load(backend, emitter, copies.uploaded, 0.01)
    events = [json.loads(line) for line in out.getvalue().splitlines()]
    found = [event["value"] for event in events if event.get("kind") == step]
    return {
        one.get("gpu", one.get("source")): one.get("gb_per_s", one.get("tflop_per_s"))
        for one in found
    }


@pytest.mark.parametrize("step", ["host speed", "pair speed", "memory speed", "load"])
def test_every_speed_is_rid_of_a_burst_and_not_of_a_fault(step: str) -> None:
    soon_over, lasting = speeds_of(step, 4), speeds_of(step, 10_000)
    assert soon_over[1] == pytest.approx(soon_over[0])
    assert lasting[1] < lasting[0] / 10
