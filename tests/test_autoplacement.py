"""What a plan of ``auto`` depends on: a quick run must not import transformers anew each time."""

from __future__ import annotations

from typing import Any

import pytest

from pytest_multigpu import autoplacement
from pytest_multigpu.model import automap
from pytest_multigpu.options import Settings
from pytest_multigpu.planbook import PlanBook
from pytest_multigpu.records.automap import AutoMap
from pytest_multigpu.records.machine import Gpu, Machine
from pytest_multigpu.units import GIB, MIB


@pytest.fixture
def book() -> PlanBook:
    gpu = Gpu(
        index=0, cuda_index=0, uuid="GPU-0", name="small", total_bytes=64 * MIB,
        free_bytes=64 * MIB, used_bytes=0, reserved_bytes=0, capability=(9, 0),
    )  # fmt: skip
    return PlanBook(Settings(model="tiny-llama"), Machine(gpus=(gpu,), visible=(0,)), {})


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Host bytes that the planner was given, call by call; it sends every layer to the CPU."""
    calls: list[int] = []

    def planner(*_: Any, cpu_bytes: int, **__: Any) -> AutoMap:
        calls.append(cpu_bytes)
        return AutoMap(device_map={"": "cpu"}, refusal=None, offloaded=("",))

    monkeypatch.setattr(automap, "auto_device_map", planner)
    return calls


@pytest.mark.parametrize("available", [2 * GIB, 3 * GIB, 200 * GIB + 1])
def test_a_host_with_room_for_all_is_not_asked_how_much(
    book: PlanBook, asked: list[int], monkeypatch: pytest.MonkeyPatch, available: int
) -> None:
    monkeypatch.setattr(autoplacement, "_available_host_bytes", lambda: available)
    book.plan("16bit")
    assert len(asked) == 1
    assert asked[0] > 1000 * GIB


def test_a_host_too_small_for_the_rest_is(
    book: PlanBook, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    need = book.architecture("16bit").weights_bytes
    monkeypatch.setattr(autoplacement, "_available_host_bytes", lambda: need)
    book.plan("16bit")
    assert len(asked) == 1
    monkeypatch.setattr(autoplacement, "_available_host_bytes", lambda: need - 1)
    PlanBook(book.settings, book.machine, {}).plan("16bit")
    assert asked[1:] == [asked[0], (need - 1) // GIB * GIB]
