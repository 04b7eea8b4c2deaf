"""The fault-planting worker, and reports to judge."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from fake_worker import Handle

from pytest_multigpu.machine import nvml, worker
from pytest_multigpu.machine.fake import FakeNvml
from pytest_multigpu.records.worker import (
    ChainCopy,
    GpuSpeed,
    PairCopy,
    Product,
    TorchVersions,
    Upload,
    WorkerDevice,
    WorkerReport,
    WorkerStep,
)

FAULTY = Path(__file__).parents[1] / "support" / "faulty_worker.py"
STEPS = ("import torch", "copies", "chains", "arithmetic", "load", "pair speed")


@pytest.fixture(scope="session")
def faulty_command() -> tuple[str, ...]:
    """The main that plants a fault, to be followed by ``--fault=JSON``."""
    return (sys.executable, "-u", str(FAULTY))


@pytest.fixture(scope="session")
def faulty() -> ModuleType:
    """That main as a module."""
    spec = importlib.util.spec_from_file_location("faulty_worker", FAULTY)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    found = FakeNvml(2)
    monkeypatch.setattr(nvml, "load_nvml", lambda: found)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return found


@pytest.fixture
def handles(monkeypatch: pytest.MonkeyPatch) -> list[Handle]:
    started: list[Handle] = []

    def start(**_options: Any) -> Handle:
        started.append(Handle())
        return started[-1]

    monkeypatch.setattr(worker, "start_worker", start)
    return started


def healthy_report(count: int = 4, name: str = "NVIDIA H100 80GB HBM3") -> WorkerReport:
    """What ``count`` sound H100s give."""
    gpus = range(count)
    pairs = [(source, target) for source in gpus for target in gpus if source != target]
    return WorkerReport(
        versions=TorchVersions(torch="2.11.0", cuda="13.0", arch_list=("sm_80", "sm_90")),
        devices=tuple(
            WorkerDevice(
                index=gpu,
                uuid=f"GPU-{gpu:032x}",
                name=name,
                capability=(9, 0),
                total_bytes=80 << 30,
                free_bytes=79 << 30,
            )
            for gpu in gpus
        ),
        uploads=tuple(Upload(gpu=gpu, bytes=1 << 26, equal=True, gb_per_s=54.0) for gpu in gpus),
        pairs=tuple(
            PairCopy(
                source=source,
                target=target,
                bytes=1 << 26,
                differing_bytes=0,
                gb_per_s=200.0,
                link="NVLink",
                topology="SYS",
            )
            for source, target in pairs
        ),
        chains=tuple(
            ChainCopy(order=(*gpus, 0), bytes=1 << 26, differing_bytes=0, after_kernel=after)
            for after in (False, True)
            if count > 1
        ),
        products=tuple(
            Product(gpu=gpu, dtype=dtype, size=4096, checksum=77, relative_error=1e-6)
            for dtype in ("bfloat16", "float32")
            for gpu in gpus
        ),
        speeds=tuple(GpuSpeed(gpu=gpu, memory_gb_per_s=3000.0, tflop_per_s=600.0) for gpu in gpus),
        steps=tuple(
            WorkerStep(name=step, started=1.0, seconds=0.1, gpus=tuple(gpus)) for step in STEPS
        ),
        seconds=6.2,
    )


@pytest.fixture
def healthy() -> Callable[..., WorkerReport]:
    """``healthy(count, **changes)``."""

    def make(count: int = 4, **changes: Any) -> WorkerReport:
        return replace(healthy_report(count), **changes)

    return make
