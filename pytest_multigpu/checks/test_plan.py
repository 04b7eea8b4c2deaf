"""The plan: the model fits, nothing spills, with room for the context. Loads nothing."""

from __future__ import annotations

import pytest

from pytest_multigpu.judging.plan import judge_context, judge_plan
from pytest_multigpu.planning.fit import largest_context
from pytest_multigpu.records.check import Record
from pytest_multigpu.records.machine import Machine
from pytest_multigpu.records.plan import Plan


@pytest.mark.quick
@pytest.mark.check(needs="plan")
def test_the_model_fits(gpu_plan: Plan) -> list[Record]:
    """The plan fits; nothing is offloaded; no GPU's predicted peak is above its free memory."""
    return judge_plan(gpu_plan)


@pytest.mark.quick
@pytest.mark.check(needs="plan")
def test_room_for_the_context(gpu_plan: Plan, gpu_inventory: Machine) -> Record:
    """The longest context that fits as placed is at least the one asked for."""
    largest = 0  # where nothing is placed, for want of a GPU
    if gpu_plan.device_map:
        largest = largest_context(
            gpu_plan.architecture,
            gpu_plan.device_map,
            gpu_inventory,
            batch=gpu_plan.batch,
            known=gpu_plan.context_tokens if gpu_plan.fits else 0,
            weights=gpu_plan.weights,
        )
    return judge_context(gpu_plan, largest)
