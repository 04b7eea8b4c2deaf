"""The order of the shipped checks: nothing waits that need not."""

from __future__ import annotations

import pytest


def test_what_waits_for_the_worker_comes_last_among_the_quick(pytester: pytest.Pytester) -> None:
    result = pytester.runpytest_subprocess(
        "--gpu-tier=cpu", "--collect-only", "-q", "-p", "no:randomly",
        "--pyargs", "pytest_multigpu.checks",
    )  # fmt: skip
    names = [line.rpartition("::")[2] for line in result.outlines if "::" in line]
    quick = names[: names.index("test_parameters_lie_where_planned")]
    waiting = ["test_driver", "test_visibility", "test_health"]
    assert quick.index("test_room_for_the_context") < quick.index("test_driver")
    assert quick.index("test_free_vram") < quick.index("test_the_model_fits")
    assert [name for name in quick if name in waiting] == waiting
    assert quick[-1] == "test_speed_under_load"
    assert names.index("test_peaks") == len(names) - 1
