"""The end of a run: whatever cannot be written, the verdict is printed last and says so."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_multigpu.report import atomic, html

CHECK = """
    import pytest
    from pytest_multigpu.records.check import Record

    pytestmark = [pytest.mark.check(needs="host"), pytest.mark.quick]

    def test_it():
        return Record(name="a thing", outcome="passed")

    def test_next():
        return Record(name="another", outcome="passed")
"""
NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
UNWRITTEN = (
    "NOT READY: --gpu-report: cannot be written (No space left on device); free some space, or "
    "name another place (cpu tier: no GPU was checked)"
)


@pytest.fixture
def run(pytester: pytest.Pytester) -> Callable[..., pytest.RunResult]:
    def start(*args: str) -> pytest.RunResult:
        pytester.makepyfile(test_it=CHECK)
        result = pytester.runpytest("--gpu-tier=cpu", *args)
        assert "INTERNALERROR" not in result.stdout.str() + result.stderr.str()
        return result

    return start


Run = Callable[..., pytest.RunResult]


def fail_writes(monkeypatch: pytest.MonkeyPatch, name: str, *, from_write: int = 0) -> None:
    """No space for files of that name, from one write on."""
    real = atomic.write_atomic
    writes = 0

    def write(path: Path, content: str) -> None:
        nonlocal writes
        if path.name == name:
            writes += 1
            if writes > from_write:
                raise NO_SPACE
        real(path, content)

    monkeypatch.setattr(atomic, "write_atomic", write)
    monkeypatch.setattr(html, "write_atomic", write)


def test_a_baseline_of_a_run_that_measured_nothing(run: Run) -> None:
    result = run("--gpu-baseline=b.json", "--gpu-baseline-update")
    assert result.ret == 1
    assert result.outlines[-1] == (
        "NOT READY: --gpu-baseline-update: this run made no plan to record under; run more of the "
        "checks (cpu tier: no GPU was checked)"
    )
    assert not Path("b.json").exists()


def test_a_baseline_beside_quick_checks_only(pytester: pytest.Pytester) -> None:
    args = ("--gpu-baseline=b.json", "--gpu-baseline-update", "--gpu-checks", "-m", "quick")
    result = pytester.runpytest_subprocess("--gpu-tier=cpu", *args)
    assert result.ret == 1
    assert "INTERNALERROR" not in result.stdout.str() + result.stderr.str()
    assert result.outlines[-1].startswith(
        "NOT READY: --gpu-baseline-update: this run measured nothing to record; run more than the "
        "quick checks"
    )


def test_a_baseline_damaged_meanwhile(pytester: pytest.Pytester) -> None:
    source = CHECK.replace(
        "def test_it():", "def test_it():\n        open('b.json', 'w').write('{')"
    )
    pytester.makepyfile(test_it=source)
    result = pytester.runpytest("--gpu-tier=cpu", "--gpu-baseline=b.json")
    assert result.ret == 1
    assert result.outlines[-1].startswith("NOT READY: b.json: is not JSON")


@pytest.mark.parametrize("from_write", [0, 2])
def test_a_disk_that_is_full_from_the_start_or_later(
    run: Run, monkeypatch: pytest.MonkeyPatch, from_write: int
) -> None:
    fail_writes(monkeypatch, "report.json", from_write=from_write)
    result = run("--gpu-report=out")
    result.assert_outcomes(passed=2)
    assert result.ret == 1
    assert result.outlines[-1] == UNWRITTEN
    # The page is no older than the verdict.
    assert "NOT READY" in Path("out/report.html").read_text()


def test_a_disk_that_was_full_for_a_moment(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = atomic.write_atomic, 0

    def write(path: Path, content: str) -> None:
        nonlocal calls
        calls += 1
        if calls in (2, 3):
            raise NO_SPACE
        real(path, content)

    monkeypatch.setattr(atomic, "write_atomic", write)
    assert run("--gpu-report=out").ret == 0
    assert calls > 3
    assert json.loads(Path("out/report.json").read_text())["verdict"] == "READY"


def test_a_page_that_cannot_be_written(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_writes(monkeypatch, "report.html")
    result = run("--gpu-report=out")
    assert (result.ret, result.outlines[-1]) == (1, UNWRITTEN)
    report = json.loads(Path("out/report.json").read_text())
    assert (report["line"], report["exit_code"]) == (UNWRITTEN, 1)
    assert any("FAILED   --gpu-report" in line for line in result.outlines)


def test_a_page_that_would_say_another_verdict_is_removed(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, pages = atomic.write_atomic, 0

    def write(path: Path, content: str) -> None:
        nonlocal pages
        pages += path.name == "report.html"
        if path.name == "report.json" or pages > 1:
            raise NO_SPACE
        real(path, content)

    monkeypatch.setattr(atomic, "write_atomic", write)
    monkeypatch.setattr(html, "write_atomic", write)
    assert run("--gpu-report=out").outlines[-1] == UNWRITTEN
    assert not Path("out/report.html").exists()


@pytest.mark.parametrize("distributed", [[], ["-n1"]])
def test_a_folder_that_cannot_be_made_ends_the_run_before_it_starts(
    run: Run, monkeypatch: pytest.MonkeyPatch, distributed: list[str]
) -> None:
    real = Path.mkdir

    def mkdir(self: Path, *arguments: Any, **options: Any) -> None:
        if self.name == "out":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        real(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    result = run("--gpu-report=out", *distributed)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert [line for line in result.errlines if line] == [
        "ERROR: --gpu-report: cannot write to out (Read-only file system); name a folder that can "
        "be written"
    ]


def test_a_step_summary_that_cannot_be_written_is_a_warning(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "nowhere/summary.md")
    result = run("--gpu-report=out")
    assert result.ret == 0
    assert result.outlines[-1] == (
        "READY: 2 checks passed, 1 warning (cpu tier: no GPU was checked)"
    )
    assert result.outlines[-3:-1] == [
        "warned   GITHUB_STEP_SUMMARY    written  not written",
        "         GITHUB_STEP_SUMMARY: cannot be written (No such file or directory); free some "
        "space, or name another place",
    ]
    report = json.loads(Path("out/report.json").read_text())
    assert report["line"] == result.outlines[-1]
    assert [line for line in result.outlines if line.startswith("::")] == [
        "::warning title=GITHUB_STEP_SUMMARY::GITHUB_STEP_SUMMARY: cannot be written (No such "
        "file or directory); free some space, or name another place"
    ]


def test_github_without_annotations_gets_no_empty_line(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    result = run("-q")
    assert result.outlines[-1].startswith("READY: ")
    assert re.fullmatch(r"2 passed(, \d+ warnings?)? in .*", result.outlines[-2])


@pytest.mark.parametrize("args", [["--collect-only"], ["--markers"], ["--help"], ["--fixtures"]])
def test_runs_that_run_nothing_leave_the_earlier_report(
    run: Run, args: list[str], pytester: pytest.Pytester
) -> None:
    assert run("--gpu-report=out").ret == 0
    before = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    assert set(before) >= {"report.json", "report.html"}
    assert run("--gpu-report=out", *args).ret == 0
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == before


def test_xdist_controllers_leave_it_too(pytester: pytest.Pytester) -> None:
    pytest.importorskip("xdist")
    pytester.makepyfile(test_it=CHECK)
    args: Any = ("--gpu-tier=cpu", "--gpu-report=out")
    assert pytester.runpytest_subprocess(*args).ret == 0
    before = Path("out/report.json").read_bytes()
    pytester.runpytest_subprocess(*args, "--collect-only", "-n1")
    assert Path("out/report.json").read_bytes() == before


@pytest.mark.parametrize("code", [0, 10])
def test_a_test_that_ends_the_run_is_no_green(pytester: pytest.Pytester, code: int) -> None:
    """``pytest.exit`` with a code of its own; a second Ctrl-C leaves pytest's at 0 as well."""
    source = CHECK.replace(
        'return Record(name="another", outcome="passed")',
        f'pytest.exit("enough", returncode={code})',
    )
    pytester.makepyfile(test_it=source)
    args = ("--gpu-tier=cpu", "--gpu-report=out", "-p", "no:randomly")
    result = pytester.runpytest_subprocess(*args)
    assert result.ret == pytest.ExitCode.INTERRUPTED
    reason = "the run was interrupted during test_it.py::test_next"
    result.stdout.fnmatch_lines([f"NOT READY: {reason} (cpu tier: no GPU was checked)"])
    report = json.loads(Path("out/report.json").read_text())
    assert (report["verdict"], report["reasons"]) == ("NOT READY", [reason])


def test_a_run_that_ends_between_two_tests_is_no_green(pytester: pytest.Pytester) -> None:
    pytester.makeconftest("""
        import pytest

        def pytest_runtest_logfinish(nodeid):
            if nodeid.endswith("test_it"):
                pytest.exit("enough", returncode=0)
    """)
    pytester.makepyfile(test_it=CHECK)
    result = pytester.runpytest_subprocess("--gpu-tier=cpu", "-p", "no:randomly")
    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.stdout.fnmatch_lines(
        ["NOT READY: the run was interrupted (cpu tier: no GPU was checked)"]
    )
