"""An environment that asks for TF32 everywhere is no reason to call a GPU wrong."""

from __future__ import annotations

import os
import threading
from io import StringIO

import pytest

from pytest_multigpu.machine import cuda_worker
from pytest_multigpu.machine.cuda.links import NvmlSide


@pytest.mark.parametrize(("devices", "override"), [("cuda", "0"), ("cpu,cpu", "1")])
def test_products_are_not_rounded_to_tf32(
    devices: str, override: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything of CUDA starts, which reads it once. Stand-ins leave the process alone."""
    seen: list[str] = []

    def start(_side: NvmlSide) -> NvmlSide:
        seen.append(os.environ["NVIDIA_TF32_OVERRIDE"])
        raise RuntimeError("far enough")

    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    monkeypatch.setattr(NvmlSide, "start", start)
    monkeypatch.setattr(cuda_worker, "_take_stdout", StringIO)
    monkeypatch.setattr(cuda_worker, "_end_with_parent", lambda _seconds: None)
    before = threading.active_count()
    assert cuda_worker.main(["--devices", devices]) == 1
    assert seen == [override]
    assert threading.active_count() == before
