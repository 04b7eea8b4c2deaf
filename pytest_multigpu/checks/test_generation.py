"""Greedy generation: repeatable, finite, the cache honest, and the speed beside its floor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pytest_multigpu.judging.generation import judge_generation, tolerance_for
from pytest_multigpu.judging.health import throttled
from pytest_multigpu.judging.interconnect import slow_hops
from pytest_multigpu.judging.machine import label
from pytest_multigpu.judging.speed import judge_speed
from pytest_multigpu.records.check import Record
from pytest_multigpu.records.generation import GenerationReading
from pytest_multigpu.records.machine import Machine
from pytest_multigpu.records.worker import WorkerReport

if TYPE_CHECKING:
    from pytest_multigpu.machine.health import Sampler
    from pytest_multigpu.model.loaded import LoadedModel


@pytest.mark.check(needs="model")
def test_greedy_generation(
    gpu_model: LoadedModel, generation_reading: GenerationReading
) -> list[Record]:
    """Twice the same tokens and logits, all finite, and cached decoding equal to one uncached
    forward."""
    architecture = gpu_model.architecture
    return judge_generation(
        generation_reading, tolerance_for(architecture.tier, architecture.dtype)
    )


@pytest.mark.check(needs="model")
def test_speed(
    request: pytest.FixtureRequest,
    gpu_model: LoadedModel,
    gpu_inventory: Machine,
    generation_reading: GenerationReading,
    generation_health: Sampler,
) -> list[Record]:
    """Prefill and decode, beside the floor that the measured memory bandwidth sets."""
    if not gpu_model.cuda_devices:
        return judge_speed(generation_reading, gpu_model.placement, {}, gpu_model.architecture)
    # Asked for only where there is a GPU: the worker would start for nothing.
    worker: WorkerReport = request.getfixturevalue("gpu_worker")
    return judge_speed(
        generation_reading,
        gpu_model.placement,
        {
            f"cuda:{speed.gpu}": speed.memory_gb_per_s * 1e9
            for speed in worker.speeds
            if speed.memory_gb_per_s is not None
        },
        gpu_model.architecture,
        throttled=throttled(
            generation_health.result(), {gpu.index: label(gpu) for gpu in gpu_inventory.gpus}
        ),
        slow_links=slow_hops(worker, gpu_model.cuda_path),
    )
