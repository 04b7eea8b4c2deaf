"""Readings that several checks share: taken once, whatever the order of the tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pytest_multigpu.judging.generation import tolerance_for
from pytest_multigpu.records.generation import GenerationReading

if TYPE_CHECKING:
    from pytest_multigpu.model.generation import Generated
    from pytest_multigpu.model.loaded import LoadedModel
    from pytest_multigpu.probes.witness import Witness
    from pytest_multigpu.session import GpuSession


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
def generation_reading(
    gpu_model: LoadedModel, watched_generation: tuple[Generated, Witness]
) -> GenerationReading:
    """That generation, a second one, and one uncached forward."""
    from pytest_multigpu.model.generation import read_generation

    architecture = gpu_model.architecture
    tolerance = tolerance_for(architecture.tier, architecture.dtype)
    return read_generation(gpu_model, watched_generation[0], tolerance=tolerance)
