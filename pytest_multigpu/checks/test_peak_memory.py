"""Peaks of load, probe, prefill and decode per GPU, beside the plan and the VRAM."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pytest_multigpu.judging.memory import judge_peaks, with_load
from pytest_multigpu.model.peaks import measure_phases
from pytest_multigpu.records.check import Record
from pytest_multigpu.records.machine import Machine

if TYPE_CHECKING:
    from pytest_multigpu.model.loaded import LoadedModel
    from pytest_multigpu.model.memory import PeakMeter
    from pytest_multigpu.records.plan import Plan


@pytest.mark.check(needs="model")
def test_peaks(
    gpu_model: LoadedModel, gpu_plan: Plan, gpu_memory: PeakMeter, gpu_inventory: Machine
) -> list[Record]:
    """At the planned context and batch, no GPU goes over its limit or far from its prediction."""
    phases = measure_phases(
        gpu_model, gpu_memory, context_tokens=gpu_plan.context_tokens, batch=gpu_plan.batch
    )
    others = {
        f"cuda:{gpu.cuda_index}": gpu.used_bytes
        for gpu in gpu_inventory.visible_gpus
        if gpu.cuda_index is not None
    }
    load = with_load(gpu_model.load.peaks, phases)
    return judge_peaks([load, *phases], gpu_plan, others=others)
