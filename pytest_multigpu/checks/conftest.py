"""Readings that several checks share: taken once, whatever the order of the tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pytest_multigpu.judging.generation import tolerance_for
from pytest_multigpu.records.generation import GenerationReading

if TYPE_CHECKING:
    from pytest_multigpu.model.loaded import LoadedModel


@pytest.fixture(scope="session")
def generation_reading(gpu_model: LoadedModel) -> GenerationReading:
    """Two greedy generations of a chat prompt and one uncached forward."""
    from pytest_multigpu.model.generation import read_generation

    architecture = gpu_model.architecture
    tolerance = tolerance_for(architecture.tier, architecture.dtype)
    return read_generation(gpu_model, tolerance=tolerance)
