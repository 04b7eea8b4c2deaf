"""report.json: schema 1, whole at every moment, JSON whatever was measured."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from report_examples import check, few_gpus, four_h100s, plan

from pytest_multigpu.errors import UsageError
from pytest_multigpu.judging.verdict import decide
from pytest_multigpu.records.check import Record
from pytest_multigpu.records.plan import Parts
from pytest_multigpu.records.report import CheckResult, RunReport
from pytest_multigpu.report.atomic import write_atomic, write_json
from pytest_multigpu.report.folder import ReportFile, read_report
from pytest_multigpu.report.json import to_json

SCHEMA = {
    "": {"schema", "verdict", "reasons", "machine", "plan", "load", "checks", "versions"},
    "machine": {"driver", "cuda", "visible", "simulated", "gpus"},
    "gpus": {"index", "uuid", "name", "total_bytes", "free_bytes", "capability"},
    "plan": {
        "model",
        "weights",
        "tier",
        "dtype",
        "placement",
        "fits",
        "context_tokens",
        "batch",
        "weights_bytes",
        "devices",
        "offloaded",
        "device_map",
        "max_memory",
    },
    "devices": {
        "device",
        "layers",
        "weights_bytes",
        "kv_bytes",
        "activation_bytes",
        "reserve_bytes",
        "peak_bytes",
        "limit_bytes",
    },
    "load": {"seconds", "bytes"},
    "checks": {
        "nodeid",
        "outcome",
        "name",
        "expected",
        "measured",
        "unit",
        "device",
        "remedy",
        "seconds",
    },
}


def test_every_key_of_schema_1_is_there() -> None:
    report = four_h100s()
    data = to_json(replace(report, verdict=decide(report)))
    assert data["schema"] == 1
    assert data["verdict"] == "READY"
    assert SCHEMA[""] <= set(data)
    for key in ("machine", "plan", "load"):
        assert SCHEMA[key] <= set(data[key]), key
    assert all(SCHEMA["gpus"] <= set(row) for row in data["machine"]["gpus"])
    assert all(SCHEMA["devices"] <= set(row) for row in data["plan"]["devices"])
    assert all(SCHEMA["checks"] <= set(row) for row in data["checks"])
    assert data["plan"]["weights_bytes"] == 141_107_412_992
    assert data["plan"]["devices"][0]["layers"] == [0, 18]
    assert data["machine"]["gpus"][0]["capability"] == [9, 0]
    assert json.loads(json.dumps(data, allow_nan=False)) == data


def test_each_peak_in_parts() -> None:
    found = four_h100s()
    assert found.plan is not None
    first = replace(found.plan.devices[0], parts={"load": Parts(weights_bytes=7, slack_bytes=2)})
    plan = replace(found.plan, devices=(first, *found.plan.devices[1:]))
    data = to_json(replace(found, plan=plan))["plan"]
    assert data["devices"][0]["parts"] == {
        "load": {
            "context_bytes": 0,
            "weights_bytes": 7,
            "kv_bytes": 0,
            "activations_bytes": 0,
            "logits_bytes": 0,
            "workspace_bytes": 0,
            "transient_bytes": 0,
            "slack_bytes": 2,
        }
    }
    assert data["devices"][1]["parts"] == {}


def test_the_max_memory_of_the_plan_or_null() -> None:
    report = four_h100s()
    assert report.plan is not None
    assert to_json(report)["plan"]["max_memory"] is None
    found = to_json(replace(report, plan=replace(report.plan, max_memory={0: "35GiB", 1: 7})))
    # A JSON object's keys are texts.
    assert found["plan"]["max_memory"] == {"0": "35GiB", "1": 7}


def test_an_empty_run_has_the_same_keys() -> None:
    data = to_json(RunReport())
    assert SCHEMA[""] <= set(data)
    assert data["verdict"] is None
    assert data["machine"] is None


def test_a_failed_check_row() -> None:
    assert to_json(RunReport(checks=(few_gpus(),)))["checks"] == [
        {
            "nodeid": "pytest_multigpu/checks/test_machine.py::test_gpu_count",
            "outcome": "failed",
            "name": "GPUs",
            "expected": 2,
            "measured": 1,
            "unit": "GPUs",
            "device": "",
            "reason": "needs 2 GPUs with 40.0 GiB free each; found 1 (GPU 0: 79.2 GiB free)",
            "remedy": "rent 2 or more",
            "shortfall": True,
            "seconds": 0.5,
        }
    ]


def test_skips_and_crashes_are_rows_of_their_own() -> None:
    passed = Record(name="a", outcome="passed")
    rows = to_json(
        RunReport(
            checks=(
                CheckResult(nodeid="t.py::test_s", outcome="skipped", reason="needs NVLink"),
                CheckResult(
                    nodeid="t.py::test_c", outcome="error", reason="OSError: x", records=(passed,)
                ),
            )
        )
    )["checks"]
    told = [(row["name"], row["outcome"], row["reason"]) for row in rows]
    assert told == [
        ("test_s", "skipped", "needs NVLink"),
        ("a", "passed", ""),
        ("test_c", "error", "OSError: x"),
    ]


@pytest.mark.parametrize(
    ("value", "text"), [(float("nan"), "nan"), (float("inf"), "inf"), (float("-inf"), "-inf")]
)
def test_what_is_no_number_becomes_null_and_its_text(value: float, text: str) -> None:
    record = Record(name="logits", outcome="failed", measured=value)
    row = to_json(RunReport(checks=(check("x", record),)))["checks"][0]
    assert row["measured"] is None
    assert row["measured_text"] == text


def test_files_follow_the_run(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "report"
    file = ReportFile(folder)
    file.update(RunReport(running="t.py::test_load"))
    assert read_report(folder / "report.json")["running"] == "t.py::test_load"
    assert not (folder / "device_map.json").exists()
    file.update(RunReport(plan=plan()))
    device_map = json.loads((folder / "device_map.json").read_text())
    assert device_map == dict(plan().device_map)
    assert device_map["lm_head"] == 3
    assert sorted(path.name for path in folder.iterdir()) == ["device_map.json", "report.json"]


def test_the_observed_map_wins_over_the_planned_one(tmp_path: Path) -> None:
    report = four_h100s()
    assert report.placement is not None
    observed = replace(report.placement, device_map={"": 0})
    ReportFile(tmp_path).update(replace(report, placement=observed))
    assert json.loads((tmp_path / "device_map.json").read_text()) == {"": 0}


def test_an_earlier_runs_files_do_not_pass_for_this_ones(tmp_path: Path) -> None:
    for name in ("report.json", "device_map.json", "report.html", ".report.json.x.tmp", "mine"):
        (tmp_path / name).write_text("old")
    file = ReportFile(tmp_path)
    assert len(list(tmp_path.iterdir())) == 5  # nothing is touched before there is a run
    file.open()
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    (tmp_path / "report.json").write_text("mine too")
    file.open()
    assert (tmp_path / "report.json").read_text() == "mine too"


def test_a_folder_that_cannot_be_made_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError) as caught:
        ReportFile(tmp_path / "file" / "x").open()
    assert str(caught.value) == (
        f"--gpu-report: cannot write to {tmp_path / 'file' / 'x'} (Not a directory); "
        "name a folder that can be written"
    )


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.json"
    write_json(path, {"a": 1})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})


def test_others_may_read_it(tmp_path: Path) -> None:
    write_atomic(tmp_path / "x", "text")
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o666 & ~umask


_WRITER = """
import sys; sys.path.insert(0, {tests!r})
from dataclasses import replace
from pathlib import Path
from report_examples import four_h100s
from pytest_multigpu.report.folder import ReportFile
report, file = four_h100s(), ReportFile(Path({folder!r}))
n = 0
while True:
    file.update(replace(report, running=f"t.py::test_{{n}}"))
    if n == 0: print("started", flush=True)
    n += 1
"""


def test_killed_while_writing_leaves_a_whole_report_that_names_the_check(tmp_path: Path) -> None:
    for i in range(5):
        folder = tmp_path / str(i)
        code = _WRITER.format(tests=str(Path(__file__).parents[1] / "support"), folder=str(folder))
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert child.stdout is not None
        assert child.stdout.readline() == b"started\n"
        time.sleep(0.003 * i + 0.0011)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        data = read_report(folder / "report.json")
        assert data["running"].startswith("t.py::test_")
        assert len(data["checks"]) == 17


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "{",
            "is not JSON (Expecting property name enclosed in double quotes: line 1 column 2 "
            "(char 1))",
        ),
        ("[]", "is not a report of schema 1"),
        ('{"schema": 2}', "is not a report of schema 1"),
    ],
)
def test_reading_a_damaged_report(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        read_report(path)
    assert str(caught.value) == f"{path}: {message}"


def test_reading_a_missing_report(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot be read \(No such file or directory\)$"):
        read_report(tmp_path / "x")


def test_rows_have_lines_of_their_own_and_vram_is_columns(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    report = four_h100s()
    write_json(path, to_json(report))
    lines = path.read_text().splitlines()
    assert lines[1] == '"schema": 1,'
    assert sum(line.startswith(' {"nodeid": "pytest_multigpu/checks') for line in lines) == 17 + 2
    data = read_report(path)
    assert data == to_json(report)
    assert len(data["vram"]["cuda:3"]["seconds"]) == 60
    assert data["vram"]["cuda:3"]["used_bytes"][59] == 36 * 2**30
    write_json(path, {})
    assert path.read_text() == "{}\n"
