"""Readings that several checks share: taken once, whatever the order of the tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pytest_multigpu.judging.generation import tolerance_for
from pytest_multigpu.records.generation import GenerationReading

if TYPE_CHECKING:
    from pytest_multigpu.machine.health import Sampler
    from pytest_multigpu.model.generation import Generated
    from pytest_multigpu.model.loaded import LoadedModel
    from pytest_multigpu.probes.witness import Witness
    from pytest_multigpu.records.machine import Machine
    from pytest_multigpu.session import GpuSession

_SAMPLE_SECONDS = 0.5
"""Between two readings of health while tokens are timed: seldom enough not to be timed as well."""


@pytest.fixture(scope="session")
def watched_generation(
    gpu_model: LoadedModel, gpu_session: GpuSession
) -> tuple[Generated, Witness]:
    """One greedy generation of a chat prompt, while the probe's layers are watched.

    A probe that is damaged or does not fit is not this fixture's concern: the witness tells the
    probe's checks.
    """
    from pytest_multigpu.model.generation import first_generation
    from pytest_multigpu.probes.witness import Witness

    with Witness(gpu_model.model, lambda: gpu_session.probe) as witness:
        generated = first_generation(gpu_model)
    return generated, witness


@pytest.fixture(scope="session")
def generation_health(gpu_model: LoadedModel, gpu_inventory: Machine) -> Sampler:
    """Health of the GPUs that hold the model; ``generation_reading`` samples it."""
    from pytest_multigpu.machine.health import Sampler

    used = [gpu_inventory.visible[index] for index in gpu_model.cuda_devices]
    return Sampler(used, interval=_SAMPLE_SECONDS)


@pytest.fixture(scope="session")
def generation_reading(
    gpu_model: LoadedModel,
    watched_generation: tuple[Generated, Witness],
    generation_health: Sampler,
) -> GenerationReading:
    """That generation, a second one, and one uncached forward."""
    from pytest_multigpu.model.generation import read_generation

    architecture = gpu_model.architecture
    tolerance = tolerance_for(architecture.tier, architecture.dtype)
    if not gpu_model.cuda_devices:
        return read_generation(gpu_model, watched_generation[0], tolerance=tolerance)
    with generation_health:
        return read_generation(gpu_model, watched_generation[0], tolerance=tolerance)
