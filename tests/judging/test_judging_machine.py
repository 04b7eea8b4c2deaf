"""Verdicts on GPUs, visibility, VRAM, driver and kernels: outcomes and texts, word for word."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pytest_multigpu.judging.driver import judge_architectures, judge_driver
from pytest_multigpu.judging.machine import judge_gpus
from pytest_multigpu.judging.visibility import judge_cuda, judge_visibility
from pytest_multigpu.judging.vram import HELD_LIMIT, judge_free_memory
from pytest_multigpu.records.check import Record
from pytest_multigpu.records.health import FreeMemory, Holder
from pytest_multigpu.records.machine import Gpu, Machine
from pytest_multigpu.records.visibility import GpuEnvironment, Visibility
from pytest_multigpu.units import GIB


def gpu(index: int, cuda_index: int | None = None, **changes: object) -> Gpu:
    base = Gpu(
        index=index,
        cuda_index=index if cuda_index is None else cuda_index,
        uuid=f"GPU-{index}",
        name="NVIDIA H100 80GB HBM3",
        total_bytes=80 * GIB,
        free_bytes=80 * GIB,
        capability=(9, 0),
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def machine(*gpus: Gpu) -> Machine:
    return Machine(
        gpus=gpus,
        visible=tuple(one.index for one in gpus),
        driver="550.54",
        cuda="12.4",
    )


FOUR = machine(*(gpu(index) for index in range(4)))
SEEN = Visibility(value=None, form="unset", visible=(0, 1, 2, 3))


def bad(records: list[Record]) -> list[tuple[str, str, str]]:
    return [(r.outcome, r.reason, r.remedy) for r in records if r.outcome != "passed"]


def test_gpus() -> None:
    (record,) = judge_gpus(FOUR)
    assert (record.outcome, record.measured) == ("passed", "4 x NVIDIA H100 80GB HBM3")


def test_no_gpu_is_a_shortfall_and_broken_detection_is_not() -> None:
    (none,) = judge_gpus(Machine())
    assert (none.outcome, none.shortfall) == ("failed", True)
    assert none.reason == "this machine has no NVIDIA GPU"
    (broken,) = judge_gpus(Machine(problem="NVML cannot start: Driver Not Loaded"))
    assert (broken.outcome, broken.shortfall) == ("failed", False)
    assert broken.reason == "NVML cannot start: Driver Not Loaded"


def test_a_lost_gpu_is_red_and_named() -> None:
    lost, rest = judge_gpus(machine(gpu(0), gpu(1, problem="GPU 1 cannot be read: GPU is lost")))
    assert (lost.outcome, lost.device) == ("failed", "GPU 1")
    assert lost.reason == "GPU 1 cannot be read: GPU is lost"
    assert rest.measured == "1 x NVIDIA H100 80GB HBM3"


def test_mixed_gpus_are_a_warning() -> None:
    (record,) = judge_gpus(machine(gpu(0), gpu(1, name="NVIDIA RTX A6000")))
    assert record.outcome == "warned"
    assert record.reason == (
        "mixed GPUs: 1 x NVIDIA H100 80GB HBM3 + 1 x NVIDIA RTX A6000; the slowest sets the pace"
    )


@pytest.mark.parametrize(
    ("visibility", "environment", "uuids", "expected"),
    [
        (SEEN, GpuEnvironment(device_files=4), ["0", "GPU-1", "2", "3"], []),
        (
            Visibility(
                value="0,0",
                form="indices",
                visible=(),
                faults=("entry '0' is repeated: CUDA then sees no GPU at all",),
                mend="export CUDA_VISIBLE_DEVICES=0",
            ),
            GpuEnvironment(),
            [],
            [
                (
                    "failed",
                    "CUDA_VISIBLE_DEVICES=0,0: entry '0' is repeated: CUDA then sees no GPU at all",
                    "export CUDA_VISIBLE_DEVICES=0",
                )
            ],
        ),
        (
            Visibility(value="", form="empty", visible=(), mend="unset CUDA_VISIBLE_DEVICES"),
            GpuEnvironment(),
            [],
            [
                (
                    "failed",
                    "CUDA_VISIBLE_DEVICES is empty, which hides all 4 GPUs",
                    "unset CUDA_VISIBLE_DEVICES",
                )
            ],
        ),
        (
            SEEN,
            GpuEnvironment(runpod_gpu_count="8"),
            ["0", "1", "2", "3"],
            [
                (
                    "failed",
                    "RUNPOD_GPU_COUNT=8, but NVML lists 4",
                    "runpodctl stop pod $RUNPOD_POD_ID && runpodctl start pod $RUNPOD_POD_ID",
                )
            ],
        ),
        (SEEN, GpuEnvironment(runpod_gpu_count="4"), ["0", "1", "2", "3"], []),
        (SEEN, GpuEnvironment(nvidia_visible_devices="all"), ["0", "1", "2", "3"], []),
        (SEEN, GpuEnvironment(nvidia_visible_devices="void"), ["0", "1", "2", "3"], []),
        (SEEN, GpuEnvironment(nvidia_visible_devices="0,1,2,3"), ["0", "1", "2", "3"], []),
        (
            SEEN,
            GpuEnvironment(nvidia_visible_devices="GPU-0,GPU-7"),
            ["0", "1", "2", "3"],
            [
                (
                    "failed",
                    "NVIDIA_VISIBLE_DEVICES=GPU-0,GPU-7: GPU-7 is not there, NVML lists 4",
                    "start the container anew: docker run --gpus all",
                )
            ],
        ),
        (
            SEEN,
            GpuEnvironment(cuda_device_order="BUS"),
            ["0", "1", "2", "3"],
            [
                (
                    "warned",
                    "CUDA_DEVICE_ORDER=BUS is not a value that CUDA knows",
                    "export CUDA_DEVICE_ORDER=PCI_BUS_ID",
                )
            ],
        ),
        (
            SEEN,
            GpuEnvironment(),
            ["1", "0", "2", "3"],
            [
                (
                    "warned",
                    "CUDA numbers the GPUs differently from nvidia-smi",
                    "export CUDA_DEVICE_ORDER=PCI_BUS_ID",
                )
            ],
        ),
        (
            SEEN,
            GpuEnvironment(device_files=5),
            ["0", "1", "2", "x"],
            [
                (
                    "warned",
                    "/dev has 5 NVIDIA GPUs, but NVML lists 4",
                    "nvidia-smi -L lists what is left; if one is gone, reboot or rent another",
                ),
                (
                    "failed",
                    "CUDA does not see GPU 3; CUDA sees x, which NVML does not show as visible",
                    "unset CUDA_VISIBLE_DEVICES; if that changes nothing, reboot or rent another",
                ),
            ],
        ),
    ],
)
def test_visibility(
    visibility: Visibility,
    environment: GpuEnvironment,
    uuids: list[str],
    expected: list[tuple[str, str, str]],
) -> None:
    assert bad(judge_visibility(FOUR, visibility, environment, uuids)) == expected


def test_cuda_that_was_not_asked_is_unknown() -> None:
    records = judge_visibility(FOUR, SEEN, GpuEnvironment(), None, "the worker died")
    assert [record.outcome for record in records] == ["passed", "unknown"]
    assert records[1].reason == "the worker died"


def row(used: int, *holders: Holder) -> FreeMemory:
    return FreeMemory(
        gpu=2,
        total_bytes=80 * GIB,
        used_bytes=used,
        free_bytes=80 * GIB - used,
        holders=holders,
    )


@pytest.mark.parametrize(("spare", "outcome"), [(1, "passed"), (0, "passed"), (-1, "failed")])
def test_free_memory_at_the_byte(spare: int, outcome: str) -> None:
    used = GIB // 2
    need = 80 * GIB - used - spare
    (record,) = judge_free_memory(FOUR, [row(used)], {2: need}, plan_fits=True)
    assert (record.outcome, record.expected, record.unit) == (outcome, need, "bytes")


@pytest.mark.parametrize(("more", "outcome"), [(0, "passed"), (1, "warned")])
def test_memory_that_others_hold_at_the_byte(more: int, outcome: str) -> None:
    (record,) = judge_free_memory(FOUR, [row(HELD_LIMIT + more)], {2: GIB}, plan_fits=True)
    assert record.outcome == outcome


def test_a_holder_is_named() -> None:
    holder = Holder(gpu=2, pid=123, used_bytes=50 * GIB, name="python", user="alice")
    (record,) = judge_free_memory(
        FOUR, [row(50 * GIB, holder)], {2: 37 * GIB}, plan_fits=True, waited=10.1
    )
    assert (record.outcome, record.shortfall, record.device) == ("failed", False, "GPU 2")
    assert record.reason == (
        "GPU 2 needs 37.0 GiB free; found 30.0 GiB after waiting 10 s: "
        "50.0 GiB held by python (PID 123, alice, 50.0 GiB)"
    )
    assert record.remedy == "kill 123"


def test_an_invisible_holder_and_a_plan_that_does_not_fit() -> None:
    (record,) = judge_free_memory(FOUR, [row(40 * GIB)], {}, plan_fits=False)
    assert record.outcome == "failed"
    assert record.reason == (
        "GPU 2 has 40.0 GiB of 80.0 GiB free: "
        "40.0 GiB held by a holder that is not visible from here"
    )


def test_a_gpu_that_is_too_small_is_left_to_the_plan() -> None:
    (record,) = judge_free_memory(FOUR, [row(0)], {2: 90 * GIB}, plan_fits=False)
    assert (record.outcome, record.expected) == ("passed", None)


def test_mixed_cards_in_another_order_than_the_plans_are_a_failure() -> None:
    mixed = replace(SEEN, certain_order=False)
    (record,) = judge_cuda(FOUR, mixed, GpuEnvironment(), ["1", "0", "2", "3"])
    assert (record.outcome, record.reason, record.remedy) == (
        "failed",
        "CUDA numbers the GPUs differently from nvidia-smi, which the plan followed",
        "export CUDA_DEVICE_ORDER=PCI_BUS_ID",
    )
    (same,) = judge_cuda(FOUR, mixed, GpuEnvironment(), ["0", "1", "2", "3"])
    assert same.outcome == "passed"


@pytest.mark.parametrize(
    ("torch", "cuda", "outcome", "reason"),
    [
        ("2.11.0", "12.8", "passed", ""),
        ("2.11.0", "13.0", "failed", "driver 550.54 serves CUDA 12.4; torch 2.11.0 needs 13.0"),
        ("2.11.0", None, "failed", "torch 2.11.0 is a CPU build: it cannot use the GPUs"),
        (None, None, "failed", "torch is not installed"),
    ],
)
def test_driver(torch: str | None, cuda: str | None, outcome: str, reason: str) -> None:
    (record,) = judge_driver(FOUR, torch, cuda)
    assert (record.outcome, record.reason) == (outcome, reason)
    if outcome == "failed":
        assert record.remedy.endswith("/whl/cu126")


def test_cuda_that_does_not_start() -> None:
    (record,) = judge_driver(FOUR, "2.11.0", "12.8", "Error 802: system not yet initialized")
    assert record.outcome == "failed"
    assert record.remedy.startswith("systemctl start nvidia-fabricmanager")
    (unknown,) = judge_driver(replace(FOUR, cuda=None), "2.11.0", "12.8")
    assert unknown.outcome == "unknown"


@pytest.mark.parametrize(
    ("capability", "architectures", "outcome"),
    [
        ((9, 0), ["sm_80", "sm_90"], "passed"),
        ((8, 9), ["sm_80", "sm_86"], "passed"),
        ((8, 0), ["sm_86"], "failed"),
        ((12, 0), ["sm_90", "sm_100"], "failed"),
        ((12, 0), ["sm_90", "compute_90"], "passed"),
        ((12, 1), ["sm_120"], "passed"),
        ((10, 3), ["sm_100a"], "failed"),
        ((10, 0), ["sm_100a"], "passed"),
        ((7, 0), ["sm_75", "compute_90"], "failed"),
        ((9, 0), [], "unknown"),
        (None, ["sm_90"], "unknown"),
    ],
)
def test_architectures(
    capability: tuple[int, int] | None, architectures: list[str], outcome: str
) -> None:
    (record,) = judge_architectures(machine(gpu(0, capability=capability)), architectures)
    assert record.outcome == outcome
