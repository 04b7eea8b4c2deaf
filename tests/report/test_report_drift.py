"""drift.json: scores are added and never changed, and a damaged file is one clear error."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from report_examples import text_scores

from pytest_multigpu.errors import UsageError
from pytest_multigpu.records.report import RunReport
from pytest_multigpu.report.drift import drift_rows, keep_scores, read_drift
from pytest_multigpu.report.json import to_json

REMEDY = "repair it, move it away, or name another --gpu-report folder"
SIXTEEN = text_scores()
EIGHT = replace(SIXTEEN, tier="8bit", when=2.0, values=(1.0, 2.0, 3.0, 4.0))
FOUR = replace(SIXTEEN, tier="4bit", when=3.0, values=(3.0, 1.0, 2.0, 0.0))


def test_tiers_accumulate_and_make_a_table(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "drift.json"
    assert read_drift(path) == ()
    for scores in (EIGHT, SIXTEEN, FOUR):
        keep_scores(path, scores)
    assert read_drift(path) == (EIGHT, SIXTEEN, FOUR)
    table = json.loads(path.read_text())["drift"]
    assert [(row["base"], row["tier"], row["advice"]) for row in table] == [
        (
            "16bit",
            "8bit",
            "scores move from 16bit to 8bit while their ranks hold: recalibrate the threshold in "
            "8bit",
        ),
        ("16bit", "4bit", "4bit ranks texts otherwise than 16bit: fit the probe again in 4bit"),
    ]
    assert table[0]["shift"] == pytest.approx(1 / 1.25**0.5)
    near = replace(EIGHT, values=(0.0, 1.01, 2.0, 3.0))
    assert drift_rows([SIXTEEN, near])[0]["advice"] == "the threshold of 16bit holds"


def test_what_is_kept_is_never_changed(tmp_path: Path) -> None:
    path = tmp_path / "drift.json"
    keep_scores(path, SIXTEEN)
    before = path.read_bytes()
    # The same set-up again: on another number of GPUs, later, with other scores.
    keep_scores(path, replace(SIXTEEN, gpus=SIXTEEN.gpus[:1], when=9.0, values=(5.0, 6.0, 8.0, 9)))
    assert path.read_bytes() == before
    others = (
        replace(SIXTEEN, versions={"torch": "2.12"}),
        replace(SIXTEEN, gpus=("NVIDIA A100",)),
        replace(SIXTEEN, dtype="float16"),
        replace(SIXTEEN, probe="other"),
        replace(SIXTEEN, texts="mine 1", values=(1.0, 2.0, 3.0)),
    )
    for scores in others:
        keep_scores(path, scores)
    assert read_drift(path) == (SIXTEEN, *others)


def row(**changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = to_json(RunReport(scores=SIXTEEN))["scores"]
    return {**found, **changes}


def test_the_report_has_the_scores_too() -> None:
    assert row()["values"] == [0.0, 1.0, 2.0, 3.0]
    assert row()["tier"] == "16bit"
    assert to_json(RunReport())["scores"] is None


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (
            "{",
            "is not JSON (Expecting property name enclosed in double quotes: line 1 column 2 "
            "(char 1))",
        ),
        ("[]", "has no list of scores"),
        ('{"schema": 1}', "has no list of scores"),
        ('{"schema": 2, "scores": []}', "schema is 2, known is 1"),
        ('{"schema": true, "scores": []}', "schema is True, known is 1"),
        ([5], "scores 1: is not an object"),
        ([row(model=None)], "scores 1: model: None is not text"),
        ([row(), row(probe=3)], "scores 2: probe: 3 is not text"),
        ([row(tier="6bit")], "scores 1: tier and dtype: '6bit' and 'bfloat16' are not known"),
        ([row(dtype="\n")], "scores 1: tier and dtype: '16bit' and '\\n' are not known"),
        ([row(gpus="H100")], "scores 1: gpus: is not a list of names"),
        ([row(gpus=[1])], "scores 1: gpus: is not a list of names"),
        ([row(versions={"torch": 2})], "scores 1: versions: is not package to version"),
        ([row(values=None)], "scores 1: when and values must be numbers"),
        ([row(values=[1, 2, "3"])], "scores 1: when and values must be numbers"),
        ([row(values=[1, 2, float("nan")])], "scores 1: when and values must be numbers"),
        ([row(values=[1, 2, float("inf")])], "scores 1: when and values must be numbers"),
        ([row(values=[1, 2, 1e60])], "scores 1: when and values must be numbers"),
        ([row(values=[1, 2, 10**400])], "scores 1: when and values must be numbers"),
        ([row(values=[1, 2, True])], "scores 1: when and values must be numbers"),
        ([row(when="now")], "scores 1: when and values must be numbers"),
        ([row(values=[1, 2])], "scores 1: values: needs three scores or more that differ"),
        ([row(values=[1, 1, 1])], "scores 1: values: needs three scores or more that differ"),
        ([row(values=[0, 0, 1e-61])], "scores 1: values: needs three scores or more that differ"),
        ([row(), row(values=[1, 2, 3])], "scores 2: values: 3 scores for 4 texts"),
        ([row(texts="alibi-60 4d5c8eb8")], "scores 1: values: 4 scores for 60 texts"),
    ],
)
def test_damaged_files(tmp_path: Path, content: Any, text: str) -> None:
    path = tmp_path / "drift.json"
    whole = content if isinstance(content, str) else json.dumps({"schema": 1, "scores": content})
    path.write_text(whole)
    for act in (lambda: read_drift(path), lambda: keep_scores(path, EIGHT)):
        with pytest.raises(UsageError) as error:
            act()
        assert str(error.value) == f"{path}: {text}; {REMEDY}"
    assert path.read_text() == whole


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "drift.json"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match=r"drift\.json: is not UTF-8; repair it"):
        read_drift(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(UsageError) as error:
        read_drift(path)
    assert str(error.value) == (
        f"{path}: cannot be read (it is a folder, not a regular file); {REMEDY}"
    )


def _keep(path: str, number: int) -> None:
    keep_scores(Path(path), replace(SIXTEEN, probe=f"probe {number}"))


def test_two_runs_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "drift.json"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_keep, args=(str(path), i)) for i in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sorted(one.probe for one in read_drift(path)) == [f"probe {i}" for i in range(8)]
    assert [left.name for left in tmp_path.iterdir()] == ["drift.json"]
