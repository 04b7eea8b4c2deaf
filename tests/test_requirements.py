from __future__ import annotations

import pytest

from pytest_multigpu.records.machine import Gpu, Machine
from pytest_multigpu.requirements import GpuRequirement, Wanted, unmet
from pytest_multigpu.units import GIB

H100_FREE = int(79.2 * GIB)


def gpu(index: int, free_bytes: int = H100_FREE, **other: object) -> Gpu:
    values: dict[str, object] = {
        "index": index,
        "cuda_index": index,
        "uuid": f"GPU-{index}",
        "name": "NVIDIA H100 80GB HBM3",
        "total_bytes": 85_520_809_984,
        "free_bytes": free_bytes,
        "capability": (9, 0),
        "nvlinks": 18,
    }
    return Gpu(**{**values, **other})  # type: ignore[arg-type]


def machine(*gpus: Gpu, **other: object) -> Machine:
    visible = tuple(card.index for card in gpus)
    return Machine(gpus=gpus, **{"visible": visible, **other})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("need", "found", "text"),
    [
        (
            GpuRequirement(count=2, vram_bytes=40 * GIB),
            machine(gpu(0)),
            "needs 2 GPUs with 40.0 GiB free each; found 1 (GPU 0: 79.2 GiB free)",
        ),
        (GpuRequirement(), machine(), "needs 1 GPU; found no GPU"),
        (
            GpuRequirement(),
            machine(gpu(0), gpu(1), visible=(), visible_env=""),
            "needs 1 GPU; found no visible GPU (CUDA_VISIBLE_DEVICES='' hides 2)",
        ),
        (
            GpuRequirement(vram_bytes=40 * GIB),
            machine(gpu(0, 40 * GIB - 1), gpu(1, GIB)),
            "needs 1 GPU with 40.0 GiB free; found 0 (GPU 0: 40.0 GiB free, GPU 1: 1.0 GiB free)",
        ),
        (
            GpuRequirement(capability=(9, 0)),
            machine(gpu(0, capability=(8, 9)), gpu(1, capability=None)),
            "needs 1 GPU with compute capability 9.0 or newer; found 0 (GPU 0: 79.2 GiB free, "
            "capability 8.9, GPU 1: 79.2 GiB free, capability unknown)",
        ),
        (
            GpuRequirement(count=2, nvlink=True),
            machine(gpu(0), gpu(1, nvlinks=0)),
            "needs 2 GPUs with NVLink; found 1 (GPU 0: 79.2 GiB free, 18 NVLinks up, "
            "GPU 1: 79.2 GiB free, 0 NVLinks up)",
        ),
        (
            GpuRequirement(total_vram_bytes=160 * GIB),
            machine(gpu(0)),
            "needs 160.0 GiB free over all GPUs; found 79.2 GiB (GPU 0: 79.2 GiB free)",
        ),
        (
            GpuRequirement(count=2, total_vram_bytes=160 * GIB),
            machine(gpu(0)),
            "needs 2 GPUs, 160.0 GiB free over all; found 1 (GPU 0: 79.2 GiB free)",
        ),
        (
            GpuRequirement(total_vram_bytes=240 * GIB),
            machine(gpu(0), gpu(1, problem="GPU is lost"), gpu(2, GIB)),
            "needs 240.0 GiB free over all GPUs; found 80.2 GiB (GPU 0: 79.2 GiB free, "
            "GPU 1: GPU is lost, GPU 2: 1.0 GiB free)",
        ),
        (
            GpuRequirement(vram_bytes=80 * GIB, capability=(9, 0), nvlink=True),
            machine(gpu(0, nvlinks=None)),
            "needs 1 GPU with 80.0 GiB free, compute capability 9.0 or newer, NVLink; found 0 "
            "(GPU 0: 79.2 GiB free, capability 9.0, NVLinks unknown)",
        ),
        (
            GpuRequirement(),
            machine(gpu(0), visible=()),
            "needs 1 GPU; found no visible GPU (CUDA_VISIBLE_DEVICES hides 1)",
        ),
        (
            GpuRequirement(capability=(0, 1)),
            machine(gpu(0, capability=None)),
            "needs 1 GPU with compute capability 0.1 or newer; found 0 (GPU 0: 79.2 GiB free, "
            "capability unknown)",
        ),
        (
            GpuRequirement(count=2),
            machine(gpu(0), gpu(1, problem="GPU is lost")),
            "needs 2 GPUs; found 1 (GPU 0: 79.2 GiB free, GPU 1: GPU is lost)",
        ),
    ],
)
def test_what_is_lacking(need: GpuRequirement, found: Machine, text: str) -> None:
    assert unmet(need, found) == text


@pytest.mark.parametrize(
    "need",
    [
        GpuRequirement(vram_bytes=H100_FREE),
        GpuRequirement(count=2),
        GpuRequirement(total_vram_bytes=2 * H100_FREE),
        GpuRequirement(capability=(9, 0)),
        GpuRequirement(capability=(8, 9), nvlink=True, count=2),
    ],
)
def test_met_at_the_limit(need: GpuRequirement) -> None:
    assert unmet(need, machine(gpu(0), gpu(1))) is None


@pytest.mark.parametrize(
    "need",
    [
        GpuRequirement(vram_bytes=H100_FREE + 1),
        GpuRequirement(count=3),
        GpuRequirement(total_vram_bytes=2 * H100_FREE + 1),
        GpuRequirement(capability=(9, 1)),
    ],
)
def test_unmet_one_over_the_limit(need: GpuRequirement) -> None:
    assert unmet(need, machine(gpu(0), gpu(1))) is not None


def test_one_gpu_is_asked_for_unless_said_otherwise() -> None:
    assert unmet(GpuRequirement(), machine(gpu(0, nvlinks=0, capability=None))) is None


def test_nothing_is_wanted_that_nobody_asked_for() -> None:
    nothing = Wanted(worker=False, model=False, plan=False, needs=())
    assert Wanted() == nothing
