"""A game's repository: the shipped checks beside its own tests, by ini or by option."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

GAME = '{"backend_type": "probe", "use_quantized": true, "quantization_bits": 4, "_comment": 1}'


@pytest.mark.parametrize("args", [[], ["."], ["test_game.py"]])
def test_the_ini_value_adds_the_checks(pytester: pytest.Pytester, args: list[str]) -> None:
    pytester.makeini("[pytest]\ngpu_checks = true\ngpu_config = game.json\n")
    Path("game.json").write_text(GAME)
    pytester.makepyfile(test_game="def test_game(): pass")
    result = pytester.runpytest_subprocess("--gpu-tier=cpu", "--collect-only", "-q", *args)
    collected = [line for line in result.outlines if "::" in line]
    assert "test_game.py::test_game" in collected
    assert any(line.endswith("test_plan.py::test_the_model_fits") for line in collected)


def test_quick_leaves_the_rest_out(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_game="def test_game(): pass")
    result = pytester.runpytest_subprocess("--gpu-tier=cpu", "--gpu-checks", "-m", "quick")
    assert result.ret == 0
    assert result.outlines[-1].startswith("READY: 4 checks passed")


def test_without_it_nothing_is_added(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_game="def test_game(): pass")
    pytester.runpytest_subprocess().assert_outcomes(passed=1)


SUPPORT = Path(__file__).parents[1] / "support"


@pytest.mark.parametrize("how", ["ini", "option"])
def test_one_test_by_its_name_is_just_that_one(pytester: pytest.Pytester, how: str) -> None:
    """The ini value means files and folders; the option was given for this very run."""
    if how == "ini":
        pytester.makeini("[pytest]\ngpu_checks = true\n")
    pytester.makepyfile(test_game="def test_game(): pass\ndef test_other(): pass")
    args = ["--gpu-checks"] if how == "option" else []
    result = pytester.runpytest_subprocess(
        "--gpu-tier=cpu", "--collect-only", "-q", "test_game.py::test_game", *args
    )
    collected = [line for line in result.outlines if "::" in line]
    if how == "ini":
        assert collected == ["test_game.py::test_game"]
    else:
        assert "test_game.py::test_game" in collected
        assert len(collected) > 20


def test_the_worker_does_not_go_on_beside_own_tests(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ran ahead for checks that were then deselected."""
    hangs = {"kind": "hang", "at": "open", "gpus": [0]}
    monkeypatch.setenv("PLANT", json.dumps([["nvml", {}], ["worker", {"fault": hangs}]]))
    monkeypatch.setenv("PYTHONPATH", f"{SUPPORT}:{os.environ.get('PYTHONPATH', '')}")
    pytester.makeini("[pytest]\ngpu_checks = true\n")
    pytester.makeconftest(
        """
        import psutil

        def pytest_collection():
            assert len(psutil.Process().children()) == 1  # it has run ahead
        """
    )
    pytester.makepyfile(
        test_own="""
        import psutil

        def test_own():
            assert psutil.Process().children() == []
        """
    )
    result = pytester.runpytest_subprocess("-p", "plant", "-k", "test_own")
    result.assert_outcomes(passed=1, deselected=30)
    assert result.outlines[-1] == "NOT CHECKED: 1 own test passed, no shipped check ran"
