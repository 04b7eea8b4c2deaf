"""Where the loaded model lies: all of it on the GPUs, as planned, every parameter there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pytest_multigpu.judging.distribution import judge_distribution
from pytest_multigpu.records.check import Record
from pytest_multigpu.records.machine import Machine

if TYPE_CHECKING:
    from pytest_multigpu.model.loaded import LoadedModel


@pytest.mark.check(needs="model")
def test_parameters_lie_where_planned(
    gpu_model: LoadedModel, gpu_inventory: Machine
) -> list[Record]:
    """Nothing on cpu, disk or meta; the total is the architecture's; the map is the plan's."""
    return judge_distribution(
        gpu_model.placement,
        gpu_model.architecture,
        gpu_model.plan,
        visible=len(gpu_inventory.visible),
    )
