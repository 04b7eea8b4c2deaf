"""What benchmarks/auto_caps.py can say without GPUs: where a placement differs, what auto does."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest

from pytest_multigpu.options import Settings
from pytest_multigpu.planbook import PlanBook
from pytest_multigpu.planning.simulate import simulate

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "auto_caps.py"


@pytest.fixture(scope="module")
def auto_caps() -> ModuleType:
    spec = importlib.util.spec_from_file_location("auto_caps", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_where_the_model_lies_elsewhere_is_named(auto_caps: ModuleType) -> None:
    settings = Settings(model="llama-3.2-1b", tier="16bit", placement="balanced")
    plan = PlanBook(settings, simulate("1xL4"), os.environ).chosen
    assert auto_caps.unlike(plan, {"": 0, "model.rotary_emb": "cpu"}) == ""
    moved = {"": 0, "model.layers.3": "cpu", "model.layers.5.mlp": 1}
    assert auto_caps.unlike(plan, moved) == "model.layers.3 on cpu, model.layers.5 split"


def test_without_a_max_memory_nothing_is_loaded(auto_caps: ModuleType) -> None:
    settings = Settings(tier="4bit", placement="balanced")
    found = auto_caps.measured(settings, simulate("2xH100"))
    assert (found["call"], found["same_as_balanced"], found["balanced_fits"]) == (None, False, True)
    # Asked on the machine that runs this, whatever it has.
    assert found["auto_alone"]
