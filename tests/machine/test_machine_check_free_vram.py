"""The free-VRAM check from fixture to record, on the fake machine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pytest_multigpu.checks.test_machine import test_free_vram as check_free_vram
from pytest_multigpu.machine import nvml as module
from pytest_multigpu.machine.fake import H100_BYTES, FakeNvml
from pytest_multigpu.options import Settings
from pytest_multigpu.records.check import Record
from pytest_multigpu.units import GIB

HELD = 40 * GIB


def run(
    fake: FakeNvml, environ: dict[str, str], need: int, *, freed: bool = True, **plan: Any
) -> tuple[list[Record], Any]:
    asked: list[str] = []
    request = SimpleNamespace(getfixturevalue=asked.append)
    machine = module.read_machine(environ, fake)
    devices = [SimpleNamespace(device=f"cuda:{i}", peak_bytes=need) for i in range(4)]
    records = check_free_vram(
        machine,
        SimpleNamespace(devices=[*devices, SimpleNamespace(device="cpu", peak_bytes=9)], **plan),  # type: ignore[arg-type]
        Settings(wait_seconds=0.0),
        SimpleNamespace(fits_if_freed=freed),  # type: ignore[arg-type]
        request,  # type: ignore[arg-type]
    )
    return records, asked


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    machine = FakeNvml(4)
    monkeypatch.setattr(module, "load_nvml", lambda: machine)
    return machine


def test_a_free_machine_is_not_asked_again(fake: FakeNvml) -> None:
    records, asked = run(fake, {}, 40 * GIB, fits=True)
    assert [record.outcome for record in records] == ["passed"] * 4
    assert asked == []
    assert "nvmlDeviceGetComputeRunningProcesses" not in fake.calls


@pytest.mark.parametrize("fits", [True, False])
def test_a_process_that_holds_40_gib_on_gpu_2(fake: FakeNvml, fits: bool) -> None:
    fake.gpus[2].used = HELD
    fake.gpus[2].processes = {4_000_000: HELD}
    records, asked = run(fake, {}, 30 * GIB, fits=fits)
    assert [record.outcome for record in records] == ["passed", "passed", "failed", "passed"]
    assert records[2].device == "GPU 2"
    assert records[2].reason.endswith("40.0 GiB held by a process (PID 4000000, 40.0 GiB)")
    assert asked == ["gpu_worker"]


@pytest.mark.parametrize(
    ("held", "outcome"),
    [
        (GIB, "passed"),
        (GIB + 1, "warned"),
        (H100_BYTES // 4, "warned"),
        (H100_BYTES // 4 + 1, "failed"),
    ],
)
def test_what_is_held_beside_a_plan_that_fits(fake: FakeNvml, held: int, outcome: str) -> None:
    """Up to a quarter of the card it is said and no more."""
    fake.gpus[2].used = held
    records, _ = run(fake, {}, 30 * GIB, fits=True)
    assert records[2].outcome == outcome


@pytest.mark.parametrize(("freed", "outcome"), [(True, "failed"), (False, "warned")])
def test_held_memory_is_the_reason_only_if_freeing_it_would_do(
    fake: FakeNvml, freed: bool, outcome: str
) -> None:
    """A desktop's 1.2 GiB does not keep a 405B off a 24 GiB card: the card does."""
    fake.gpus[2].used = GIB + GIB // 5
    records, asked = run(fake, {}, 90 * GIB, fits=False, freed=freed)
    assert [record.outcome for record in records] == ["passed", "passed", outcome, "passed"]
    assert records[2].reason == (
        "GPU 2 has 78.0 GiB of 79.6 GiB free: 1.2 GiB held by a holder that is not visible from "
        "here"
    )
    assert asked == ["gpu_worker"]


def test_the_plan_counts_in_cuda_order(fake: FakeNvml) -> None:
    fake.gpus[0].used = HELD
    records, _ = run(fake, {"CUDA_VISIBLE_DEVICES": "3,2,1,0"}, 60 * GIB, fits=True)
    assert [record.outcome for record in records] == ["passed"] * 3 + ["failed"]
    assert records[3].device == "GPU 3 (nvidia-smi 0)"


def test_memory_that_cleared_meanwhile_passes(fake: FakeNvml) -> None:
    fake.gpus[1].used = HELD

    def clear(function: str) -> None:
        if fake.calls.count("nvmlDeviceGetMemoryInfo_v2") > 4:
            fake.gpus[1].used = 0

    fake.before_call = clear
    records, _ = run(fake, {}, 60 * GIB, fits=True)
    assert [record.outcome for record in records] == ["passed"] * 4


def test_a_lost_gpu_is_red(fake: FakeNvml) -> None:
    fake.lose(3)
    records, _ = run(fake, {}, 40 * GIB, fits=True)
    assert [record.outcome for record in records] == ["passed"] * 3 + ["failed"]
    assert records[3].reason == "GPU 3 cannot be read: GPU is lost"
