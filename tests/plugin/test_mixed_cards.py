"""Cards of several models, which CUDA numbers by speed and nvidia-smi by bus: one name a card."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pytest_multigpu.errors import MachineError
from pytest_multigpu.machine import nvml
from pytest_multigpu.machine.fake import FakeGpu, FakeNvml
from pytest_multigpu.options import Settings
from pytest_multigpu.planview import print_plan
from pytest_multigpu.units import GIB

SUPPORT = Path(__file__).parents[1] / "support"
CARD = 25_757_220_864
SLOW_FIRST = {"0": {"name": "NVIDIA GeForce RTX 3090", "total": CARD, "capability": [8, 6]}}
"""nvidia-smi's GPU 0 is a 3090, its GPU 1 an H100; CUDA's are the other way round."""


@pytest.fixture(autouse=True)
def _plants(monkeypatch: pytest.MonkeyPatch) -> None:
    """The inner run finds ``plant``, and no variable of this machine reaches it."""
    before = os.environ.get("PYTHONPATH")
    paths = [str(SUPPORT), *([before] if before else [])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "RUNPOD_GPU_COUNT"):
        monkeypatch.delenv(name, raising=False)


def run(
    pytester: pytest.Pytester, patch: pytest.MonkeyPatch, *arguments: str, **options: Any
) -> tuple[Any, dict[str, Any]]:
    plant = {"gpus": 2, "change": SLOW_FIRST, "by_speed": [1, 0], **options}
    patch.setenv("PLANT", json.dumps([["nvml", plant]]))
    checks = ("--pyargs", "pytest_multigpu.checks", "-m", "quick", "--gpu-model=llama-3.1-8b")
    result = pytester.runpytest_subprocess(
        *("-p", "plant", "--gpu-report=out", *checks, *arguments), timeout=120
    )
    return result, json.loads((pytester.path / "out" / "report.json").read_text())


def by_name(report: dict[str, Any], name: str) -> dict[str, dict[str, Any]]:
    return {row["device"]: row for row in report["checks"] if row["name"] == name}


def test_plan_vram_health_and_worker_name_the_same_card(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = {**SLOW_FIRST["0"], "used": 2 * GIB, "reasons": 0x20}
    result, report = run(pytester, monkeypatch, change={"0": slow})
    assert result.ret == 0, result.outlines[-1]
    assert report["machine"]["visible"] == [1, 0]
    limits = {row["device"]: row["limit_bytes"] for row in report["plan"]["devices"]}
    assert limits["cuda:0"] > CARD > limits["cuda:1"]
    # Held and hot is nvidia-smi's GPU 0, which CUDA and the plan call GPU 1.
    slower = "GPU 1 (nvidia-smi 0)"
    assert by_name(report, "free VRAM")[slower]["outcome"] == "warned"
    assert by_name(report, "throttling under load")[slower]["outcome"] == "warned"
    assert by_name(report, "GPU order")[""]["outcome"] == "passed"
    assert by_name(report, "GPUs that CUDA sees")[""]["outcome"] == "passed"


def test_by_bus_the_numbers_are_nvidia_smis(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    result, report = run(pytester, monkeypatch)
    assert result.ret == 0, result.outlines[-1]
    assert report["machine"]["visible"] == [0, 1]


def test_an_order_that_cuda_does_not_tell_is_red(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, report = run(pytester, monkeypatch, driver_order=False)
    assert result.ret == 1
    assert report["line"] == (
        "NOT READY: mixed GPUs, which CUDA numbers by speed, and CUDA could not be asked: "
        "CUDA error 999: the plan may be for other cards; export CUDA_DEVICE_ORDER=PCI_BUS_ID "
        "(+1 more)"
    )
    assert by_name(report, "GPUs that CUDA sees")[""]["reason"] == (
        "CUDA numbers mixed GPUs otherwise than the plan, which is for other cards"
    )


def test_a_plan_alone_says_it_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def untold(environ: Mapping[str, str]) -> tuple[str, ...]:
        raise MachineError("did not answer within 10 s")

    fake = FakeNvml([FakeGpu(name="NVIDIA GeForce RTX 3090", total=CARD), FakeGpu()])
    monkeypatch.setattr(nvml, "load_nvml", lambda: fake)
    monkeypatch.setitem(nvml.read_machine.__kwdefaults__, "ask_cuda", untold)  # type: ignore[arg-type]
    print_plan(Settings(model="llama-3.1-8b", tier="4bit"))
    assert capsys.readouterr().out.splitlines()[-1] == (
        "mixed GPUs, which CUDA numbers by speed, and CUDA did not answer within 10 s: "
        "the plan may be for other cards; export CUDA_DEVICE_ORDER=PCI_BUS_ID"
    )
