"""Did the worker come through, does torch see the inventory, has it kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from pytest_multigpu.judging.worker import has_kernels, kernels, visibility, worker_came_through
from pytest_multigpu.records.machine import Gpu, Machine
from pytest_multigpu.records.worker import TorchVersions, Unmeasured, WorkerReport

Make = Callable[..., WorkerReport]


def machine(count: int = 4, **changes: object) -> Machine:
    gpus = tuple(
        Gpu(
            index=gpu,
            cuda_index=gpu,
            uuid=f"GPU-{gpu:032x}",
            name="NVIDIA H100 80GB HBM3",
            total_bytes=80 << 30,
            free_bytes=79 << 30,
        )
        for gpu in range(count)
    )
    whole = Machine(gpus=gpus, visible=tuple(range(count)))
    return replace(whole, **changes)  # type: ignore[arg-type]


def test_came_through(healthy: Make) -> None:
    record = worker_came_through(healthy())
    assert (record.outcome, record.measured) == ("passed", "6 steps in 6.2 s")


def test_hung(healthy: Make) -> None:
    report = healthy(failure="it hung", failed_step="copies", failed_gpus=(0, 2))
    record = worker_came_through(report)
    assert record.outcome == "failed"
    assert record.device == "GPU 0, GPU 2"
    assert record.reason == "it hung"
    assert "nvidia-smi --gpu-reset" in record.remedy


def test_the_same_gpus_in_the_same_order_pass(healthy: Make) -> None:
    records = visibility(healthy(), machine())
    assert [record.outcome for record in records] == ["passed"] * 4
    assert [record.device for record in records] == ["GPU 0", "GPU 1", "GPU 2", "GPU 3"]


def test_another_order_fails_on_the_gpus_that_moved(healthy: Make) -> None:
    records = visibility(healthy(), machine(visible=(1, 0, 2, 3)))
    assert [record.outcome for record in records] == ["failed", "failed", "passed", "passed"]
    zero, one = (f"GPU-{gpu:032x}" for gpu in (0, 1))
    assert records[0].reason == f"cuda:0 is {zero} for torch and {one} in the inventory"


def test_a_lost_gpu_fails(healthy: Make) -> None:
    (record,) = visibility(healthy(3), machine(4))
    assert record.outcome == "failed"
    assert record.reason == "the inventory has 4 visible GPUs and torch sees 3"
    assert not record.shortfall


def test_cuda_that_cannot_start_is_broken_where_there_are_gpus(healthy: Make) -> None:
    versions = TorchVersions(torch="2.11.0", cuda="13.0", problem="RuntimeError: driver too old")
    report = healthy(0, versions=versions)
    (record,) = visibility(report, machine())
    assert record.outcome == "failed"
    assert record.reason == "torch cannot start CUDA: RuntimeError: driver too old"
    assert not record.shortfall
    (record,) = visibility(report, Machine())
    assert record.outcome == "failed"
    assert record.shortfall


def test_no_gpu_at_all_is_a_shortfall_and_no_pass(healthy: Make) -> None:
    (record,) = visibility(healthy(0), Machine())
    assert record.outcome == "failed"
    assert record.shortfall
    (record,) = visibility(healthy(0), Machine(problem="NVML is broken"))
    assert not record.shortfall


def test_a_worker_that_died_early_leaves_visibility_unknown() -> None:
    (record,) = visibility(WorkerReport(failure="it died"), machine())
    assert (record.outcome, record.reason) == ("unknown", "not measured: it died")


def test_no_uuid_is_unknown(healthy: Make) -> None:
    report = healthy(1)
    report = replace(report, devices=(replace(report.devices[0], uuid=""),))
    (record,) = visibility(report, machine(1))
    assert record.outcome == "unknown"


def test_mig_and_case_do_not_matter(healthy: Make) -> None:
    report = healthy(1)
    uuid = report.devices[0].uuid.removeprefix("GPU-").upper()
    report = replace(report, devices=(replace(report.devices[0], uuid=f"MIG-{uuid}"),))
    (record,) = visibility(report, machine(1))
    assert record.outcome == "passed"


def test_kernels(healthy: Make) -> None:
    assert {record.outcome for record in kernels(healthy())} == {"passed"}
    versions = TorchVersions(torch="2.11.0", cuda="13.0", arch_list=("sm_80", "sm_100"))
    (record,) = kernels(healthy(1, versions=versions))
    assert record.outcome == "failed"
    assert record.reason == "torch 2.11.0 has no kernels for NVIDIA H100 80GB HBM3 (sm_90)"


@pytest.mark.parametrize(
    ("capability", "arch_list", "good"),
    [
        ((9, 0), ("sm_90",), True),
        ((9, 0), ("sm_90a",), True),
        ((8, 9), ("sm_80", "sm_86"), True),
        ((8, 0), ("sm_86",), False),
        ((9, 0), ("sm_80",), False),
        ((9, 0), ("compute_80",), True),
        ((8, 0), ("compute_90",), False),
        ((12, 0), ("sm_100", "sm_120"), True),
        ((12, 0), ("sm_90a", "sm_100"), False),
        ((12, 1), ("sm_120a",), False),
        ((9, 0), (), False),
        ((9, 0), ("gfx90a",), False),
    ],
)
def test_has_kernels(capability: tuple[int, int], arch_list: tuple[str, ...], good: bool) -> None:
    assert has_kernels(capability, arch_list) is good


def test_what_was_left_out_is_unknown_with_its_reason(healthy: Make) -> None:
    why = Unmeasured(step="devices", gpus=(2,), reason="GPU 2 has 1 MiB free")
    from pytest_multigpu.judging.interconnect import copies

    (record,) = copies(healthy(4, pairs=(), unmeasured=(why,)))
    assert record.outcome == "unknown"
    assert record.device == "GPU 2"
    assert record.reason == "not measured: GPU 2 has 1 MiB free"
