"""Did the worker come through, and what is said of what it left unmeasured."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pytest_multigpu.judging.interconnect import copies
from pytest_multigpu.judging.worker import not_measured, with_failure, worker_came_through
from pytest_multigpu.records.check import Record
from pytest_multigpu.records.worker import TorchVersions, Unmeasured, WorkerReport, WorkerStep

Make = Callable[..., WorkerReport]


def test_came_through(healthy: Make) -> None:
    record = worker_came_through(healthy())
    assert (record.outcome, record.measured) == ("passed", "6 steps in 6.2 s")


def test_hung(healthy: Make) -> None:
    report = healthy(failure="it hung", failed_step="copies", failed_gpus=(0, 2))
    record = worker_came_through(report)
    assert record.outcome == "failed"
    assert record.device == "GPU 0 -> GPU 2"
    assert record.reason == "it hung"
    assert "nvidia-smi --gpu-reset" in record.remedy


def test_before_the_gpus_were_touched_the_remedy_is_not_about_them(healthy: Make) -> None:
    begun = (WorkerStep(name="import torch", started=1.0, seconds=None),)
    for steps, stopped in (((), "its start"), (begun, "import torch")):
        step = steps[0].name if steps else None
        report = healthy(failure="it died", failed_step=step, failed_gpus=(), steps=steps)
        record = worker_came_through(report)
        assert record.measured == f"stopped at {stopped}"
        assert record.remedy.startswith("`python -c 'import torch'` in an empty folder must work")
        assert "nvidia-smi" not in record.remedy


def test_what_was_left_out_is_unknown_with_its_reason(healthy: Make) -> None:
    why = Unmeasured(step="devices", gpus=(2,), reason="GPU 2 has 1 MiB free")
    (record,) = copies(healthy(4, pairs=(), unmeasured=(why,)))
    assert record.outcome == "unknown"
    assert record.device == "GPU 2"
    assert record.reason == "not measured: GPU 2 has 1 MiB free"
    assert record.remedy == ("free the memory of that GPU, or leave it out of CUDA_VISIBLE_DEVICES")


def test_no_gpu_is_a_shortfall_and_a_dead_worker_is_not(healthy: Make) -> None:
    (record,) = not_measured(healthy(0), "a", "b", "copies")
    assert (record.outcome, record.reason) == ("unknown", "not measured: torch sees no GPU")
    assert record.shortfall
    (record,) = not_measured(healthy(0, failure="it died"), "a", "b", "copies")
    assert (record.outcome, record.reason) == ("failed", "it died")
    assert not record.shortfall


@pytest.mark.parametrize(
    ("steps", "essential"),
    [
        (("devices", "copies"), True),
        (("devices", "uploads"), True),
        (("chains",), True),
        (("arithmetic",), True),
        (("devices", "pair speed"), False),
        (("devices", "load"), False),
        (("memory speed",), False),
    ],
)
def test_ready_rests_on_bytes_and_numbers_and_not_on_speeds(
    healthy: Make, steps: tuple[str, ...], essential: bool
) -> None:
    why = Unmeasured(step=steps[0], gpus=(2,), reason="GPU 2 has 1 MiB free")
    for report in (healthy(4, unmeasured=(why,)), healthy(0)):
        (record,) = not_measured(report, "a", "b", *steps)
        assert (record.outcome, record.essential) == ("unknown", essential)


def test_ready_does_not_rest_on_gpus_that_the_plan_leaves_empty(healthy: Make) -> None:
    why = Unmeasured(step="devices", gpus=(2,), reason="GPU 2 has 1 MiB free")
    for unused, essential in (((), True), ((0, 1), True), ((2,), False), ((1, 2), False)):
        report = healthy(3, unmeasured=(why,), unused=frozenset(unused))
        (record,) = not_measured(report, "a", "b", "devices", "copies")
        assert record.essential is essential


def test_a_dead_worker_fails_every_check_once(healthy: Make) -> None:
    good = Record(name="driver", outcome="passed")
    hung = healthy(failure="it hung", failed_step="pair speed", failed_gpus=(0, 2))
    records = with_failure(hung, [good])
    assert [(one.name, one.outcome, one.device) for one in records] == [
        ("driver", "passed", ""),
        ("CUDA worker", "failed", "GPU 0 -> GPU 2"),
    ]
    assert with_failure(hung, records) == records
    assert with_failure(healthy(), [good]) == [good]
    # Its unmeasured record is no failure yet.
    unknown = Record(name="CUDA devices", outcome="unknown", reason="it hung")
    assert [one.outcome for one in with_failure(hung, [unknown])] == ["unknown", "failed"]


def test_a_worker_that_never_started() -> None:
    report = WorkerReport(failure="the CUDA worker could not be started: x", failed_step="start")
    record = worker_came_through(report)
    assert (record.outcome, record.measured) == ("failed", "never started")
    assert record.remedy == ("look at `ulimit -u`, at the container's pids.max, and at free memory")


def test_cuda_that_did_not_start_is_the_reason(healthy: Make) -> None:
    versions = TorchVersions(torch="2.11.0", cuda="13.0", problem="RuntimeError: driver too old")
    (record,) = not_measured(healthy(0, versions=versions), "a", "b", "copies")
    assert record.reason == "not measured: RuntimeError: driver too old"
    # GPUs that CUDA cannot use are broken, not missing.
    assert not record.shortfall
