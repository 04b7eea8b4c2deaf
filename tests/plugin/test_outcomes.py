"""What a check returns decides how its test ends, and what the run says last."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

CHECK = """
    import pytest
    from pytest_multigpu.records.check import Record

    pytestmark = [pytest.mark.check(needs="host"), pytest.mark.quick]

    def record(outcome, **other):
        values = dict(name="a thing", outcome=outcome, expected=2, measured=1, unit="GPUs",
                      reason="one is missing", remedy="add one")
        return Record(**(values | other))

    def test_it():
        return {returned}
"""


def run(pytester: pytest.Pytester, returned: str, *args: str) -> pytest.RunResult:
    pytester.makepyfile(CHECK.replace("{returned}", returned))
    return pytester.runpytest("--gpu-tier=cpu", *args)


def test_passed(pytester: pytest.Pytester) -> None:
    result = run(pytester, 'record("passed")')
    assert result.ret == 0
    assert result.outlines[-1] == "READY: 1 check passed (cpu tier: no GPU was checked)"


def test_failed(pytester: pytest.Pytester) -> None:
    result = run(pytester, '[record("passed"), record("failed")]')
    assert result.ret == 1
    result.assert_outcomes(failed=1)
    assert result.outlines[-1] == (
        "NOT READY: one is missing; add one (cpu tier: no GPU was checked)"
    )


def test_shortfall_is_exit_10(pytester: pytest.Pytester) -> None:
    result = run(pytester, 'record("failed", shortfall=True)')
    assert result.ret == 10


def test_shortfall_beside_a_failure_is_exit_1(pytester: pytest.Pytester) -> None:
    result = run(pytester, '[record("failed", shortfall=True), record("failed", name="b")]')
    assert result.ret == 1


def test_unknown_is_no_pass(pytester: pytest.Pytester) -> None:
    result = run(pytester, 'record("unknown")', "-rs")
    result.assert_outcomes(skipped=1)
    assert "not measured: one is missing" in result.stdout.str()
    assert result.ret == 1
    assert result.outlines[-1].startswith("NOT READY: one is missing; add one")


def test_unknown_beside_what_was_measured_is_counted(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_b=CHECK.replace("{returned}", 'record("passed")'))
    result = run(pytester, 'record("unknown")')
    assert result.ret == 0
    assert result.outlines[-1] == (
        "READY: 1 check passed, 1 unmeasured (cpu tier: no GPU was checked)"
    )


@pytest.mark.parametrize("beside", ['record("passed")', ""])
def test_unknown_that_ready_rests_on_fails(pytester: pytest.Pytester, beside: str) -> None:
    result = run(pytester, f'[{beside + ", " if beside else ""}record("unknown", essential=True)]')
    result.assert_outcomes(failed=1)
    assert result.ret == 1
    assert result.outlines[-1].startswith("NOT READY: one is missing; add one")


def test_unknown_fails_under_strict(pytester: pytest.Pytester) -> None:
    result = run(pytester, '[record("passed"), record("unknown")]', "--gpu-strict")
    result.assert_outcomes(failed=1)
    assert result.ret == 1


def test_warned_passes_and_is_counted(pytester: pytest.Pytester) -> None:
    result = run(pytester, 'record("warned")')
    assert result.ret == 0
    assert "1 warning" in result.outlines[-1]


@pytest.mark.parametrize("returned", ["None", "[]", "True", "'passed'", "[record('passed'), 1]"])
def test_a_check_that_returns_no_records_fails(pytester: pytest.Pytester, returned: str) -> None:
    result = run(pytester, returned)
    assert result.ret == 1
    result.stdout.fnmatch_lines(["*test_it returned * instead of records*"])


def test_an_exception_is_a_failure(pytester: pytest.Pytester) -> None:
    result = run(pytester, "1 / 0")
    assert result.ret == 1
    assert "ZeroDivisionError: division by zero" in result.outlines[-1]


def test_quiet_is_one_line_of_ours(pytester: pytest.Pytester) -> None:
    result = run(pytester, 'record("passed")', "-q")
    assert [line for line in result.outlines if "a thing" in line] == []
    assert result.outlines[-1].startswith("READY: ")


def test_collect_only_gives_no_verdict(pytester: pytest.Pytester) -> None:
    result = run(pytester, 'record("passed")', "--collect-only")
    assert "READY" not in result.stdout.str()


def test_a_run_about_something_else_is_left_alone(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_x(): pass")
    result = pytester.runpytest()
    assert result.ret == 0
    assert "READY" not in result.stdout.str()


def test_a_named_tier_without_any_check_is_not_ready(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_x(): pass")
    result = pytester.runpytest("--gpu-tier=cpu", "--gpu-strict")
    assert result.ret == 1
    assert result.outlines[-1].startswith("NOT READY: no check was executed")


def test_a_failing_own_test_is_exit_1(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_own="def test_x(): assert 1 == 2")
    result = run(pytester, 'record("passed")')
    assert result.ret == 1
    assert result.outlines[-1].startswith("NOT READY: test_own.py::test_x failed")


def test_a_file_that_cannot_be_imported_says_why(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_own="import no_such_module_anywhere")
    result = run(pytester, 'record("passed")')
    assert result.ret == 2
    assert result.outlines[-1] == (
        "NOT READY: test_own.py failed: could not be collected: ModuleNotFoundError: No module "
        "named 'no_such_module_anywhere' (+1 more) (cpu tier: no GPU was checked)"
    )


def test_report_is_written_with_the_same_records(pytester: pytest.Pytester) -> None:
    run(pytester, '[record("passed"), record("failed", device="GPU 1")]', "--gpu-report=out")
    report = json.loads(Path("out/report.json").read_text())
    assert report["schema"] == 1
    assert report["verdict"] == "NOT READY"
    assert report["running"] is None
    assert [(c["name"], c["outcome"], c["device"]) for c in report["checks"]] == [
        ("a thing", "passed", ""),
        ("a thing", "failed", "GPU 1"),
    ]
    assert report["checks"][0]["nodeid"].endswith("::test_it")


def test_a_killed_run_leaves_which_check_was_running(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(CHECK.replace("{returned}", "__import__('os')._exit(9)"))
    pytester.runpytest_subprocess("--gpu-tier=cpu", "--gpu-report=out")
    report = json.loads(Path("out/report.json").read_text())
    assert report["running"].endswith("::test_it")
    assert report["verdict"] is None


def test_junit_has_the_records_of_each_attempt_once(pytester: pytest.Pytester) -> None:
    pytest.importorskip("pytest_rerunfailures")
    source = CHECK.replace("def test_it():", "TRIES = []\n    def test_it(request):")
    tries = (
        "TRIES.append(1) or request.node.user_properties.append(('mine', len(TRIES))) or "
        "record('failed' if len(TRIES) < 3 else 'passed', measured=len(TRIES))"
    )
    pytester.makepyfile(source.replace("{returned}", tries))
    result = pytester.runpytest("--gpu-tier=cpu", "--reruns=3", "--junitxml=junit.xml")
    assert result.ret == 0
    attempts = ElementTree.parse("junit.xml").findall(".//testcase")
    assert [
        [(row.get("name"), str(row.get("value"))[:36]) for row in attempt.iter("property")]
        for attempt in attempts
    ] == [  # what is not ours stays as it is
        [("mine", "1"), ("a thing", "failed: expected 2 GPUs, measured 1 ")],
        [("mine", "1"), ("mine", "2"), ("a thing", "failed: expected 2 GPUs, measured 2 ")],
        [
            *(("mine", "1"), ("mine", "2"), ("mine", "3")),
            ("a thing", "passed: expected 2 GPUs, measured 3 "),
        ],
    ]
