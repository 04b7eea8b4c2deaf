"""Limits of the shipped checks through pytest-timeout, its own settings first, and hard hangs."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_multigpu import timeouts
from pytest_multigpu.timeouts import seconds_for

CHECK = """
    import pytest, signal, time
    from pytest_multigpu.records.check import Record

    pytestmark = pytest.mark.check(needs="host")

    def test_it(request):
        marks = [mark.args for mark in request.node.iter_markers("timeout")]
        print("LIMITS", marks)
        {body}
        return Record(name="a thing", outcome="passed")

    def test_next():
        return Record(name="another", outcome="passed")
"""


def session(tier: str = "auto", wait: float = 10.0, **facts: Any) -> Any:
    return SimpleNamespace(
        settings=SimpleNamespace(tier=tier, wait_seconds=wait), facts=lambda: facts
    )


def plan(weights: str, parameters: int) -> Any:
    return SimpleNamespace(weights=weights, architecture=SimpleNamespace(parameters=parameters))


def test_seconds_by_kind_and_bytes() -> None:
    assert seconds_for("host", session()) == 130
    assert seconds_for("gpu", session(wait=0)) == 120
    assert seconds_for("model", session(tier="cpu")) == 300
    assert seconds_for("model", session(plan=plan("checkpoint", 10**9), load=object())) == 300
    assert seconds_for("model", session(plan=plan("checkpoint", 10**9))) == 340
    assert seconds_for("model", session(plan=plan("synthetic", 10**9))) == 304
    assert seconds_for("model", session(plan=plan("checkpoint", 70 * 10**9))) == 3100
    assert seconds_for("model", session()) == 3300


def limits(pytester: pytest.Pytester, *args: str, body: str = "") -> str:
    pytester.makepyfile(CHECK.replace("{body}", body or "pass"))
    result = pytester.runpytest("--gpu-tier=cpu", "-s", *args)
    assert result.ret == 0
    return next(line for line in result.outlines if "LIMITS" in line).partition("LIMITS ")[2]


def test_checks_have_a_limit(pytester: pytest.Pytester) -> None:
    assert limits(pytester).startswith("[(130.0,)]")


@pytest.mark.parametrize("how", ["option", "ini", "environment", "no plugin"])
def test_a_limit_of_the_users_own_is_left(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    args = []
    if how == "option":
        args = ["--timeout=77"]
    elif how == "ini":
        pytester.makeini("[pytest]\ntimeout = 77\n")
    elif how == "environment":
        monkeypatch.setenv("PYTEST_TIMEOUT", "77")
    else:
        args = ["-p", "no:timeout"]  # the watchdog keeps it without a mark
    assert limits(pytester, *args).startswith("[]")


def test_a_marker_of_the_users_own_is_left(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(
        """
        import pytest

        def pytest_collection_modifyitems(items):
            for item in items:
                item.add_marker(pytest.mark.timeout(78))
        """
    )
    assert limits(pytester).startswith("[(78,)]")


def test_zero_switches_limits_off(pytester: pytest.Pytester) -> None:
    assert limits(pytester, "--timeout=0").startswith("[]")


def test_a_hang_fails_its_check_and_the_run_goes_on(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timeouts, "QUICK_SECONDS", 0.3)
    pytester.makepyfile(CHECK.replace("{body}", "time.sleep(60)"))
    result = pytester.runpytest("--gpu-tier=cpu", "--gpu-wait=0")
    result.assert_outcomes(failed=1, passed=1)
    assert result.ret == 1
    assert result.outlines[-1].startswith("NOT READY: test_a_hang")
    assert "::test_it failed: Timeout (>0.3s) from pytest-timeout." in result.outlines[-1]


BLOCKED = "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM]); time.sleep(60)"
SHORT = """
    from pytest_multigpu import timeouts
    timeouts.QUICK_SECONDS = timeouts.MODEL_SECONDS = timeouts.GRACE_SECONDS = 0.3
"""


@pytest.mark.parametrize(
    ("body", "args"), [(BLOCKED, []), ("time.sleep(60)", ["-p", "no:timeout"])]
)
def test_a_hang_that_nothing_interrupts_ends_the_run_with_a_report(
    pytester: pytest.Pytester, body: str, args: list[str]
) -> None:
    """No signal reaches it, or there is no pytest-timeout to send one."""
    pytester.makeconftest(SHORT)
    pytester.makepyfile(test_hang=CHECK.replace("{body}", body))
    result = pytester.runpytest_subprocess(
        "--gpu-tier=cpu", "--gpu-wait=0", "--gpu-report=out", *args
    )
    assert result.ret == 1
    line = (
        "NOT READY: test_hang.py::test_it failed: hung: not ended 0.3 s after its start, nor "
        "interrupted (cpu tier: no GPU was checked)"
    )
    assert result.outlines[-1] == line
    report = json.loads(Path("out/report.json").read_text())
    assert report["verdict"] == "NOT READY"
    assert report["line"] == line
    assert report["running"] == "test_hang.py::test_it"
    assert any("in test_it" in line for line in result.errlines)  # where it hung


HANGING_LOAD = """
    import time
    from pytest_multigpu.model import loading
    loading.load_model = lambda *arguments, **options: time.sleep(2)
"""


@pytest.mark.parametrize(
    ("mark", "args", "ended"),
    [
        ("", [], True),
        ("", ["-p", "no:timeout"], True),
        ("@pytest.mark.timeout(50)", [], False),
        ("", ["--timeout=0"], False),
    ],
)
def test_a_load_that_hangs_in_somebodys_own_suite(
    pytester: pytest.Pytester, mark: str, args: list[str], ended: bool
) -> None:
    pytester.makeconftest(SHORT + HANGING_LOAD)
    pytester.makepyfile(
        test_own=f"import pytest\n{mark}\ndef test_x(gpu_model): assert gpu_model is None"
    )
    result = pytester.runpytest_subprocess("--gpu-tier=cpu", *args)
    assert result.ret == (1 if ended else 0)
    if ended:
        assert result.outlines[-1] == (
            "NOT READY: test_own.py::test_x failed: loading hung: not ended 0.3 s after its "
            "start, nor interrupted (cpu tier: no GPU was checked)"
        )


def test_the_watch_over_a_check_ends_with_it(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(SHORT)
    pytester.makepyfile(CHECK.replace("{body}", "pass"), test_own="def test_own(): pass")
    pytester.makepyfile(test_zzz="import time\ndef test_slow(): time.sleep(1)")
    args = ("--gpu-tier=cpu", "--gpu-wait=0", "-p", "no:timeout")
    result = pytester.runpytest_subprocess(*args)
    result.assert_outcomes(passed=4)
    assert result.ret == 0
