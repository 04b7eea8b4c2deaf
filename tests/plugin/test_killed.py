"""A run killed with SIGKILL, at six moments: report.json is whole and names the check."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

SUPPORT = Path(__file__).parents[1] / "support"

QUICK = """
    import pytest
    from pytest_multigpu.records.check import Record

    pytestmark = pytest.mark.check(needs="host")

    def test_first():
        return Record(name="first", outcome="passed")

    def test_second():
        return Record(name="second", outcome="passed")
"""
CHECKS = Path(__file__).parents[2] / "pytest_multigpu" / "checks"


def start(folder: Path, at: str, *args: str) -> subprocess.Popen[bytes]:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "pytest", "--gpu-tier=cpu", "--gpu-report=out"]
    # One that runs under a coverage or a xdist parent must not take part in it.
    outside = ("COV_", "PYTEST_")
    environ = {key: v for key, v in os.environ.items() if not key.startswith(outside)}
    environ |= {"STOP_AT": at, "PYTHONPATH": f"{SUPPORT}:{environ.get('PYTHONPATH', '')}"}
    plugins = ["-p", "stop_at", "-p", "no:randomly", "-p", "no:cacheprovider"]
    return subprocess.Popen([*command, *plugins, *args], cwd=folder, env=environ)


def kill(
    process: subprocess.Popen[bytes], folder: Path, *, seconds: float = 100, wait: float = 0
) -> dict[str, Any]:
    """:param wait: seconds at most for another process to write what it was told."""
    deadline = time.monotonic() + seconds
    while not (folder / "STOPPED").exists():
        assert process.poll() is None, "it ended before it came to the place"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    deadline = time.monotonic() + wait
    while "test_second" not in (read(folder)["running"] or "") and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    report = read(folder)
    assert report["schema"] == 1
    assert report["verdict"] is None
    return report


def read(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "out" / "report.json").read_text())
    return report


def test_during_load_and_during_generation(pytester: pytest.Pytester) -> None:
    loading, generating = pytester.path / "load", pytester.path / "generation"
    one = start(loading, "load", f"{CHECKS}/test_distribution.py")
    two = start(generating, "generation", f"{CHECKS}/test_generation.py")
    report = kill(one, loading)
    assert report["running"].endswith("test_distribution.py::test_parameters_lie_where_planned")
    assert report["plan"] is None or report["plan"]["model"] == "tiny-llama"
    report = kill(two, generating)
    assert report["running"].endswith("test_generation.py::test_greedy_generation")


@pytest.mark.parametrize(
    ("at", "running", "finished"),
    [
        # Nothing is known of the first yet, so it is what was running.
        ("first-write", "test_first", []),
        ("end-write", "test_second", ["test_first"]),
    ],
)
def test_during_a_report_write(
    pytester: pytest.Pytester, at: str, running: str, finished: list[str]
) -> None:
    """The file is the one before."""
    pytester.makepyfile(test_quick=QUICK)
    report = kill(start(pytester.path, at), pytester.path)
    assert [check["name"] for check in report["checks"]] == [
        name.removeprefix("test_") for name in finished
    ]
    assert report["running"] == f"test_quick.py::{running}"
    assert len(list((pytester.path / "out").glob(".report.json.*.tmp"))) == 1
    # The next run clears up what the killed one left.
    pytester.runpytest("--gpu-tier=cpu", "--gpu-report=out")
    assert not list((pytester.path / "out").glob(".report.json.*.tmp"))


@pytest.mark.parametrize("at", ["start-write", "between"])
def test_at_the_start_of_a_check(pytester: pytest.Pytester, at: str) -> None:
    """Before anything is written of it, and in its write: the file names it already."""
    pytester.makepyfile(test_quick=QUICK)
    report = kill(start(pytester.path, at), pytester.path)
    assert [check["name"] for check in report["checks"]] == ["first"]
    assert report["running"] == "test_quick.py::test_second"


def test_under_xdist_the_running_test_is_named_too(pytester: pytest.Pytester) -> None:
    pytest.importorskip("xdist")
    pytester.makepyfile(test_quick=QUICK)
    # The worker stands still once it has told the controller, which may be slow to write it.
    report = kill(start(pytester.path, "start-write", "-n1"), pytester.path, wait=20)
    assert report["running"] == "test_quick.py::test_second"


def test_a_finished_report_names_nothing(pytester: pytest.Pytester) -> None:
    """Also where a test that was to come never ran."""
    pytester.makepyfile(test_quick=QUICK.replace('outcome="passed"', 'outcome="failed"'))
    for more in ((), ("-x",)):
        pytester.runpytest("--gpu-tier=cpu", "--gpu-report=out", *more)
        report = json.loads((pytester.path / "out" / "report.json").read_text())
        assert report["running"] is None
        assert report["verdict"] == "NOT READY"
