"""The README's tables: every check and every step has a row, and each part is its own time."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pytest_multigpu.machine.worker import start_worker

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "quick_cost.py"
SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture(scope="module")
def quick_cost() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quick_cost", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["quick_cost"] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments for a run on two H100s that aren't there."""
    monkeypatch.setenv("PLANT", json.dumps([["nvml", {"gpus": 2}]]))
    monkeypatch.setenv("PYTHONPATH", str(SUPPORT), prepend=":")
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "RUNPOD_GPU_COUNT"):
        monkeypatch.delenv(name, raising=False)
    return ["-p", "plant", "--gpu-model=llama-3.1-8b", "-p", "no:randomly"]


def cells(text: str) -> dict[str, str]:
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {row[0].removeprefix("| "): row[1] for row in rows}


def test_one_command_prints_every_check_and_every_step(
    quick_cost: ModuleType, planted: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert quick_cost.main(["--runs=1", "--", *planted]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("2 x NVIDIA H100 80GB HBM3; torch 2.11.0+cu128; median of 1 runs\n")
    assert "\nREADY: llama-3.1-8b in 16bit on 2 x" in printed
    found = cells(printed)
    checks = {
        name
        for file in ("test_machine", "test_interconnect", "test_plan")
        for name in re.findall(
            r"^def (test_\w+)",
            (SCRIPT.parents[1] / f"pytest_multigpu/checks/{file}.py").read_text(),
            re.MULTILINE,
        )
    }
    rows = {*quick_cost.PARTS, *quick_cost._JUDGES}
    assert checks <= rows
    # Read speed and checkpoint have no row on a machine without one.
    absent = {"checkpoint", "read speed"}
    assert {quick_cost._shown(name) for name in set(quick_cost.PARTS) - absent} <= set(found)
    assert set(quick_cost.STEPS) <= set(found)
    assert float(found["import torch"]) > 100
    assert re.search(r"A full reading of health by NVML takes [\d.]+ ms of a thread", printed)


def test_every_step_has_its_row(quick_cost: ModuleType) -> None:
    small = ("--load-seconds=0.005", "--memory-bytes=65536")
    report = start_worker(copy_bytes=65536, devices="cpu,cpu", arguments=small).result()
    assert [step.name for step in report.steps] == list(quick_cost.STEPS)


def test_a_run_without_gpus_is_an_error(
    quick_cost: ModuleType,
    planted: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PLANT", json.dumps([["nvml", {"gpus": 0}]]))
    assert quick_cost.main(["--runs=1", "--", *planted]) == 1
    assert capsys.readouterr().err.startswith(
        "no check asked for the CUDA worker\nNOT READY: this machine has no NVIDIA GPU"
    )


def test_a_part_within_a_part_counts_once(quick_cost: ModuleType) -> None:
    clock = quick_cost.Clock()
    with clock.part("outer"):
        time.sleep(0.02)
        with clock.part("inner"):
            time.sleep(0.05)
        clock.wrap("inner", time.sleep)(0.05)
    assert 0.02 <= clock.own["outer"] < 0.05
    assert 0.1 <= clock.own["inner"] < 0.2


def run(quick_cost: ModuleType, seconds: float, copies: float, **parts: float) -> Any:
    steps = {**dict.fromkeys(quick_cost.STEPS, 0.0), "copies": copies}
    worker = {"failure": None, "gpus": ["H100"], "torch": "2", "seconds": 1.0, "steps": steps}
    return quick_cost.Run(seconds=seconds, line="READY", parts=parts, beside={}, worker=worker)


def test_medians_and_what_is_left(quick_cost: ModuleType) -> None:
    runs = [
        run(quick_cost, seconds, copies, test_gpus=0.002, test_own=gpus)
        for seconds, copies, gpus in ((1.0, 0.1, 0.5), (2.0, 0.3, 0.1), (4.0, 0.2, 0.2))
    ]
    parts = cells(quick_cost.part_table(runs))
    assert (parts["gpus"], parts["own"], parts["in all"]) == ("2.0", "200", "2000")
    assert parts["pytest: start, collection, tables, end"] == "1898"
    assert parts[quick_cost.WAITING] == "0.0"
    steps = cells(quick_cost.step_table(runs))
    assert (steps["copies"], steps["in all"]) == ("200", "1000")
    assert steps["start of its process and its end"] == "800"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"failure": "the CUDA worker died"}, "the CUDA worker died"),
        ({"steps": {"import torch": 1.0}}, "the CUDA worker took no step 'CUDA start'"),
        ({}, ""),
    ],
)
def test_half_a_run_is_told(quick_cost: ModuleType, changes: dict[str, Any], problem: str) -> None:
    whole = run(quick_cost, 1.0, 0.1)
    broken = quick_cost.Run(**{**whole.__dict__, "worker": {**whole.worker, **changes}})
    assert quick_cost._problem(broken) == problem
