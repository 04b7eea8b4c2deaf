"""The README's table: every step that the worker takes has a row and says what it catches."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from pytest_multigpu.machine.worker import start_worker
from pytest_multigpu.records.worker import WorkerReport, WorkerStep

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "quick_cost.py"


@pytest.fixture(scope="module")
def quick_cost() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quick_cost", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_step_has_its_row(quick_cost: ModuleType) -> None:
    small = ("--load-seconds=0.005", "--memory-bytes=65536")
    report = start_worker(copy_bytes=65536, devices="cpu,cpu", arguments=small).result()
    assert [step.name for step in report.steps] == list(quick_cost.CATCHES)
    assert len(quick_cost.table([report]).splitlines()) == 2 + len(report.steps) + 2


def test_medians_and_what_is_left(quick_cost: ModuleType) -> None:
    reports = [
        WorkerReport(
            seconds=whole,
            steps=(WorkerStep(name="copies", started=0.0, seconds=seconds, gpus=(0, 1)),),
        )
        for whole, seconds in ((1.0, 0.1), (2.0, 0.3), (4.0, 0.2))
    ]
    assert quick_cost.table(reports).splitlines()[2:] == [
        "| copies | 200 | pairs that deliver zeros, stale or wrong bytes |",
        "| start of the process and its end | 1800 | |",
        "| in all | 2000 | |",
    ]
