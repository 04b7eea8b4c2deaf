"""The worker of one run and the sampling beside it: started, ended, or never come about."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
from fake_worker import Handle

from pytest_multigpu.errors import MachineError
from pytest_multigpu.machine import worker
from pytest_multigpu.machine.fake import FakeNvml
from pytest_multigpu.options import Settings
from pytest_multigpu.records.worker import WorkerReport
from pytest_multigpu.requirements import GpuRequirement, Wanted
from pytest_multigpu.session import GpuSession
from pytest_multigpu.units import GIB
from pytest_multigpu.worker_run import WorkerRun


@pytest.mark.usefixtures("fake")
def test_a_worker_that_cannot_be_started_is_a_report_of_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(**_options: Any) -> Any:
        raise MachineError("the CUDA worker could not be started: no process left")

    monkeypatch.setattr(worker, "start_worker", refuse)
    run = WorkerRun([0, 1])
    assert run.report() == WorkerReport(
        failure="the CUDA worker could not be started: no process left", failed_step="start"
    )
    assert [row.index for row in run.health()] == [0, 1]
    run.close()


@pytest.mark.usefixtures("fake")
def test_a_worker_that_ran_ahead_for_nobody_is_ended(handles: list[Handle]) -> None:
    session = GpuSession(Settings(), os.environ)
    session.run_ahead()
    assert [handle.closed for handle in handles] == [False]
    session.start(Wanted())
    assert [handle.closed for handle in handles] == [True]
    # Who asks for it after all gets one that was not ended.
    assert session.worker_report().failure is None
    assert len(handles) == 2
    session.close()
    assert handles[1].closed


@pytest.mark.parametrize(
    ("need", "waits"),
    [
        (GpuRequirement(vram_bytes=60 * GIB), True),
        (GpuRequirement(vram_bytes=30 * GIB), False),
        (GpuRequirement(vram_bytes=90 * GIB), False),  # it never had so much
        (GpuRequirement(count=3), False),
    ],
)
def test_own_tests_are_waited_for_where_waiting_can_help(
    fake: FakeNvml, monkeypatch: pytest.MonkeyPatch, need: GpuRequirement, waits: bool
) -> None:
    for gpu in fake.gpus:
        gpu.used = 40 * GIB
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        fake.gpus[0].used = 0

    monkeypatch.setattr(time, "sleep", sleep)
    session = GpuSession(Settings(wait_seconds=5), os.environ)
    session.start(Wanted(needs=(need,)))
    assert bool(slept) is waits
    if waits:
        assert len(slept) == 1
        assert session.machine.gpus[0].free_bytes > 60 * GIB


@pytest.mark.usefixtures("handles")
def test_which_gpus_the_plan_leaves_empty_is_told_where_a_test_rests_on_a_plan(
    fake: FakeNvml,
) -> None:
    fake.gpus[1].total = 2 * GIB
    settings = Settings(tier="4bit", placement="balanced")
    session = GpuSession(settings, os.environ)
    session.start(Wanted(worker=True, plan=True))
    assert session.worker_report().unused == {1}
    # Somebody's own tests that ask for the worker alone pay for no plan.
    session = GpuSession(settings, os.environ)
    session.start(Wanted(worker=True))
    assert session.worker_report().unused == frozenset()
    assert session.plans.made is None
