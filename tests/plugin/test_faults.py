"""The campaign's fast faults, end to end, and the campaign's own judgement of runs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from benchmarks.fault import Fault
from benchmarks.fault_table import FAULTS, HEALTHY
from benchmarks.faults import Result, judge, run_all, summary, table

FAST = {fault.name: fault for fault in [*FAULTS, *HEALTHY] if fault.fast}


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> dict[str, Result]:
    """Those that were selected, two at a time."""
    wanted = {
        item.callspec.params["fast"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and "fast" in item.fixturenames
    }
    chosen = [FAST[name] for name in FAST if name in wanted]
    return {result.name: result for result in run_all(chosen, jobs=2, keep=None)}


@pytest.mark.parametrize("fast", FAST)
def test_planted(fast: str, results: dict[str, Result]) -> None:
    result = results[fast]
    assert result.ok, f"{result.why}: {result.actual}"


def test_names_are_told_apart() -> None:
    names = [fault.name for fault in [*FAULTS, *HEALTHY]]
    assert len(names) == len(set(names))
    assert len(FAULTS) >= 40
    assert all(fault.reason and fault.exit for fault in FAULTS)


LINE = "NOT READY: GPU 1: hot; cool it"
FAULT = Fault(name="heat", issue=3, reason=r"GPU 1: hot")


def said(
    fault: Fault, line: str = LINE, code: int = 1, stderr: str = "", **changes: Any
) -> tuple[str, str]:
    row = {
        "device": "GPU 1",
        "reason": "hot",
        "remedy": "cool it",
        "name": "t",
        "outcome": "failed",
    }
    report = {"line": line, "exit_code": code, "verdict": "NOT READY", "checks": [row]} | changes
    return judge(fault, code, f"some output\n{line}\n", stderr, report)


def test_red_for_the_stated_reason() -> None:
    assert said(FAULT) == (LINE, "")


def test_another_exit_code() -> None:
    assert said(FAULT, code=10)[1] == "exit 10 in place of 1"


def test_another_reason() -> None:
    assert said(FAULT, "NOT READY: GPU 2: hot")[1] == "the last line gives another reason"


def test_ready_with_a_fault() -> None:
    assert said(FAULT, "READY: 3 checks passed", code=0)[1] == "exit 0 in place of 1"


def test_something_else_is_red_too() -> None:
    rows = [
        {"device": f"GPU {i}", "reason": "hot", "remedy": "", "name": "t", "outcome": "failed"}
        for i in (1, 2)
    ]
    assert said(FAULT, checks=rows)[1] == "also red: GPU 2: hot; "
    allowed = dataclasses.replace(FAULT, also=(r"GPU \d: hot",))
    assert said(allowed, checks=rows)[1] == ""


def test_unknown_is_red_under_strict_only() -> None:
    row = {"device": "", "reason": "hidden", "remedy": "", "name": "t", "outcome": "unknown"}
    fault = dataclasses.replace(FAULT, reason="hidden", line="GPU 1")
    assert said(fault, checks=[row])[1] == ""
    strict = dataclasses.replace(fault, args="-m quick --gpu-strict", reason="hot")
    assert said(strict, checks=[row])[1] == "no record has that reason"


def test_a_line_that_the_report_does_not_have() -> None:
    assert said(FAULT, exit_code=0)[1] == "the report says something else"


def test_a_run_without_a_verdict() -> None:
    assert judge(FAULT, 1, "1 passed\n", "INTERNALERROR\n", None)[1].startswith("no verdict")


def test_a_healthy_run_must_be_ready_and_exit_0() -> None:
    healthy = dataclasses.replace(FAULT, reason="", exit=0)
    assert said(healthy, "READY: fine", code=0, checks=[])[1] == ""
    assert said(healthy, "NOT READY: no check was executed", code=0, checks=[])[1] == "not READY"


def test_usage_errors_are_read_from_stderr() -> None:
    fault = dataclasses.replace(FAULT, reason="unknown tier '6bit'", exit=4)
    assert judge(fault, 4, "", "ERROR: --gpu-tier: unknown tier '6bit'\n", None)[1] == ""
    assert judge(fault, 4, "", "ERROR: usage: pytest\n", None)[1] != ""


def test_killed_runs_must_name_what_was_running() -> None:
    fault = dataclasses.replace(FAULT, reason="test_load", killed=True)
    whole = {"running": "test_x.py::test_load", "verdict": None}
    assert judge(fault, -9, "", "", whole) == ("killed during test_x.py::test_load", "")
    assert judge(fault, -9, "", "", None)[1] == "the report does not name what was running"
    assert judge(fault, 0, "", "", whole)[1] == "the report does not name what was running"


def test_table_and_summary() -> None:
    good = Result(name="a|b", issue=3, expected="x", actual="y", exit=1, seconds=2.0, ok=True)
    wrong = dataclasses.replace(good, name="c", ok=False, why="exit 0 in place of 1")
    left = dataclasses.replace(good, name="d", exit=None, why="takes root")
    assert summary([good, wrong, left]) == ("2 runs, 1 as expected, 1 not planted here; NOT OK: c")
    assert table([good, wrong, left]).splitlines()[2:] == [
        "| a\\|b | 3 | x | y | 1 | 2.0 | ok |",
        "| c | 3 | x | y (exit 0 in place of 1) | 1 | 2.0 | NOT OK |",
        "| d | 3 | x | y (takes root) | - | 2.0 | not planted |",
    ]
