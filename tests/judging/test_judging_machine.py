"""Verdicts on GPUs, visibility, VRAM, driver and kernels: outcomes and texts, word for word."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pytest_multigpu.judging.driver import judge_architectures, judge_driver
from pytest_multigpu.judging.machine import judge_gpus
from pytest_multigpu.judging.visibility import judge_cuda, judge_environment
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
        (
            SEEN,
            GpuEnvironment(cuda_launch_blocking="1", cuda_module_loading="eager"),
            ["0", "1", "2", "3"],
            [
                (
                    "warned",
                    "Python waits for every kernel to end before it launches the next",
                    "unset CUDA_LAUNCH_BLOCKING",
                ),
                (
                    "warned",
                    "every kernel of every library is loaded into each context: memory that the "
                    "plan does not count",
                    "unset CUDA_MODULE_LOADING",
                ),
            ],
        ),
        (
            SEEN,
            GpuEnvironment(cuda_launch_blocking="0", cuda_module_loading="LAZY"),
            ["0", "1", "2", "3"],
            [],
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
                    "failed",
                    "CUDA_DEVICE_ORDER=BUS is no value that CUDA knows, and it does not start",
                    "export CUDA_DEVICE_ORDER=PCI_BUS_ID",
                )
            ],
        ),
        (
            SEEN,
            GpuEnvironment(cuda_device_order=""),
            ["0", "1", "2", "3"],
            [
                (
                    "failed",
                    "CUDA_DEVICE_ORDER= is no value that CUDA knows, and it does not start",
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
                    "CUDA numbers the GPUs differently from nvidia-smi: copies and speeds name "
                    "them by CUDA's numbers, VRAM and health by nvidia-smi's",
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
    records = judge_environment(FOUR, visibility, environment)
    assert bad([*records, judge_cuda(FOUR, visibility, uuids)]) == expected


def test_cuda_that_was_not_asked_is_unknown() -> None:
    record = judge_cuda(FOUR, SEEN, None, "the worker died")
    assert (record.outcome, record.reason) == ("unknown", "the worker died")


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


MIXED = replace(SEEN, certain_order=False)


def test_mixed_cards_in_another_order_than_the_plans_are_a_failure() -> None:
    record = judge_cuda(FOUR, MIXED, ["1", "0", "2", "3"])
    assert (record.outcome, record.reason, record.remedy) == (
        "failed",
        "CUDA numbers mixed GPUs otherwise than the plan, which is for other cards",
        "export CUDA_DEVICE_ORDER=PCI_BUS_ID",
    )
    assert judge_cuda(FOUR, MIXED, ["0", "1", "2", "3"]).outcome == "passed"


def test_mixed_cards_whose_order_is_a_guess_are_a_failure() -> None:
    guessed = replace(FOUR, order_problem="did not answer within 10 s")
    assert bad(judge_environment(guessed, MIXED, GpuEnvironment())) == [
        (
            "failed",
            "mixed GPUs, which CUDA numbers by speed, and CUDA did not answer within 10 s: "
            "the plan may be for other cards",
            "export CUDA_DEVICE_ORDER=PCI_BUS_ID",
        )
    ]
    known = judge_environment(FOUR, MIXED, GpuEnvironment())
    assert [(r.name, r.outcome) for r in known if r.name == "GPU order"] == [
        ("GPU order", "passed")
    ]
    assert not [r for r in judge_environment(FOUR, SEEN, GpuEnvironment()) if r.name == "GPU order"]


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
    (mask,) = judge_driver(
        FOUR, "2.11.0", "12.8", "RuntimeError: Error 101: invalid device ordinal"
    )
    assert mask.remedy == "unset CUDA_DEVICE_ORDER CUDA_VISIBLE_DEVICES"
    (other,) = judge_driver(FOUR, "2.11.0", "12.8", "RuntimeError: Error 999: unknown error")
    assert other.remedy == "reboot the machine, or rent another"
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
