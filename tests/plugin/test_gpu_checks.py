"""A game's repository: the shipped checks beside its own tests, by ini or by option."""

from __future__ import annotations

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
