"""Expected skips: exact both ways, word for word."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_multigpu.errors import UsageError
from pytest_multigpu.judging.skips import ExpectedSkips, judge_skips, means, parse_expected_skips
from pytest_multigpu.judging.verdict import decide
from pytest_multigpu.records.report import CheckResult, RunReport


def result(nodeid: str, outcome: Any = "skipped", reason: str = "no NVLink") -> CheckResult:
    return CheckResult(nodeid=nodeid, outcome=outcome, reason=reason)


def reasons(checks: list[CheckResult], *names: str, **texts: str) -> list[str]:
    expected = ExpectedSkips("skips.txt", {**dict.fromkeys(names, ""), **texts})
    judged = judge_skips(checks, expected)
    assert (judged.outcome == "passed") == all(r.outcome == "passed" for r in judged.records)
    return [f"{r.reason}; {r.remedy}" for r in judged.records if r.outcome == "failed"]


def test_exactly_as_listed_passes() -> None:
    checks = [result("a/test_x.py::test_a"), result("a/test_x.py::test_b", "passed", "")]
    assert reasons(checks, "test_x.py::test_a") == []
    assert reasons(checks, "a/test_x.py::test_a") == []
    assert reasons([], *()) == []


def test_a_skip_that_is_not_listed() -> None:
    assert reasons([result("test_x.py::test_a")]) == [
        "test_x.py::test_a was skipped and skips.txt does not list it: no NVLink; "
        "make it run, or add it to the file"
    ]


@pytest.mark.parametrize(
    ("outcome", "ended"),
    [("passed", "passed"), ("failed", "failed"), ("error", "ended in an error")],
)
def test_a_listed_one_that_ran(outcome: str, ended: str) -> None:
    assert reasons([result("test_x.py::test_a", outcome)], "test_x.py::test_a") == [
        f"skips.txt lists test_x.py::test_a, which was not skipped: it {ended}; "
        "remove it from the file"
    ]


def test_a_listed_one_that_is_not_there() -> None:
    assert reasons([], "test_x.py::test_a") == [
        "skips.txt lists test_x.py::test_a, which did not run; remove it from the file"
    ]


def test_an_entry_for_two_tests() -> None:
    checks = [result("a/test_x.py::test_a"), result("b/test_x.py::test_a")]
    assert reasons(checks, "test_x.py::test_a") == [
        "skips.txt lists test_x.py::test_a, which means 2 tests: a/test_x.py::test_a, "
        "b/test_x.py::test_a; write more of its path"
    ]
    assert reasons(checks, "a/test_x.py::test_a", "b/test_x.py::test_a") == []


def test_another_reason() -> None:
    expected = ExpectedSkips("s.json", {"test_x.py::test_a": "needs 8 GPUs"})
    (record,) = judge_skips([result("test_x.py::test_a")], expected).records
    assert record.reason == (
        "test_x.py::test_a was skipped for another reason than s.json says: "
        "expected 'needs 8 GPUs', found 'no NVLink'"
    )
    expected = ExpectedSkips("s.json", {"test_x.py::test_a": "no NVL"})
    assert judge_skips([result("test_x.py::test_a")], expected).outcome == "passed"


def test_the_end_of_a_path_is_meant_only_from_a_folder_on() -> None:
    assert means("test_x.py::test_a", "a/test_x.py::test_a")
    assert not means("x.py::test_a", "a/test_x.py::test_a")
    assert not means("test_x.py::test_a", "test_x.py::test_a2")


def test_lines_and_both_kinds_of_json() -> None:
    text = "# why\n\n  test_x.py::test_a[#1 a]  \ntest_y.py::test_b\n"
    assert parse_expected_skips(text, "f").reasons == {
        "test_x.py::test_a[#1 a]": "",
        "test_y.py::test_b": "",
    }
    assert parse_expected_skips('["a::b"]', "f").reasons == {"a::b": ""}
    assert parse_expected_skips(' {"a::b": "why"}', "f").reasons == {"a::b": "why"}
    assert parse_expected_skips("", "f").reasons == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a::b\na::b", "line 2: a::b is listed twice; remove one"),
        ('{"a::b": "", "a::b": ""}', "entry 1: a::b is listed twice; remove one"),
        ('["a::b", 3]', "entry 1: 3 is not a node id; write it like test_machine.py::test_health"),
        ('[""]', "entry 0: '' is not a node id; write it like test_machine.py::test_health"),
        ('{"a::b": null}', "a::b: None is not text; write the skip's reason"),
        (
            f"[{'9' * 5000}]",
            "malformed JSON: Exceeds the limit (4300 digits) for integer string conversion: value "
            "has 5000 digits; use sys.set_int_max_str_digits() to increase the limit",
        ),
        ('["a::b"', "malformed JSON: Expecting ',' delimiter: line 1 column 8 (char 7)"),
    ],
)
def test_malformed(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_expected_skips(text, "f")
    assert str(caught.value) == f"--gpu-expected-skips: f: {message}"


@given(st.text(max_size=60) | st.text('[]{}",:a1 \n#', max_size=60))
def test_any_text_is_a_list_or_one_clear_error(text: str) -> None:
    try:
        parse_expected_skips(text, "f")
    except UsageError as error:
        assert str(error).startswith("--gpu-expected-skips: f: ")


def test_a_passed_list_is_no_executed_check() -> None:
    skipped = result("test_x.py::test_a")
    judged = judge_skips([skipped], ExpectedSkips("f", {"test_x.py::test_a": ""}))
    verdict = decide(RunReport(checks=(skipped, judged)))
    assert not verdict.ready
    assert verdict.reasons[0].startswith("no check was executed")
