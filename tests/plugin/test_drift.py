"""Drift in real runs: kept in drift.json beside the report, compared, and never lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import pstdev
from typing import Any

import pytest

CHECK = (
    Path(__file__).parents[2] / "pytest_multigpu" / "checks" / "test_probe_scoring.py::test_drift"
)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """drift.json of one run of the cpu tier."""
    import os

    from pytest_multigpu.options import CPU_MODEL, Settings
    from pytest_multigpu.report.drift import to_json
    from pytest_multigpu.session import GpuSession

    session = GpuSession(Settings(tier="cpu", model=CPU_MODEL), os.environ)
    try:
        return to_json([session.score_texts()])
    finally:
        session.close()


Run = Callable[..., "tuple[pytest.RunResult, dict[str, Any]]"]


@pytest.fixture
def run(pytester: pytest.Pytester) -> Run:
    """The check alone, in the cpu tier, with ``out/drift.json`` as given."""

    def start(drift: Any = None, *args: str) -> tuple[pytest.RunResult, dict[str, Any]]:
        out = pytester.path / "out"
        out.mkdir(exist_ok=True)
        if drift is not None:
            (out / "drift.json").write_text(drift if isinstance(drift, str) else json.dumps(drift))
        result = pytester.runpytest("--gpu-tier=cpu", "--gpu-report=out", str(CHECK), *args)
        report = out / "report.json"
        return result, json.loads(report.read_text()) if report.exists() else {}

    return start


def kept(pytester: pytest.Pytester) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((pytester.path / "out" / "drift.json").read_text())
    return found


def changed(
    drift: dict[str, Any], change: Callable[[list[float]], list[float]], **fields: Any
) -> dict[str, Any]:
    """The file of a run whose scores were others, or that ran in another tier."""
    row = {**drift["scores"][0], **fields, "when": 1.0}
    return {"schema": 1, "scores": [{**row, "values": change(row["values"])}]}


def test_a_run_keeps_its_scores_and_the_next_compares(
    run: Run, pytester: pytest.Pytester, first: dict[str, Any]
) -> None:
    result, report = run()
    assert result.ret == 0
    assert [row["name"] for row in report["checks"]] == ["scores of the text set"]
    scores = kept(pytester)["scores"]
    assert scores == [report["scores"]]
    assert (scores[0]["tier"], len(scores[0]["values"])) == ("cpu", 60)
    # To the bit, in another process's session and in this one's.
    assert scores[0]["values"] == first["scores"][0]["values"]
    result, report = run()
    assert result.ret == 0
    row = report["checks"][1]
    assert (row["name"], row["outcome"], row["measured"]) == (
        "scores against an earlier run",
        "passed",
        "equal bits",
    )
    assert kept(pytester)["scores"] == scores
    result.stdout.fnmatch_lines(["passed   scores against an earlier run *equal bits"])


def test_another_tier_s_scores_warn_with_advice_everywhere(
    run: Run, pytester: pytest.Pytester, first: dict[str, Any]
) -> None:
    before = changed(first, lambda values: [v + 3 for v in values], tier="16bit", gpus=["H100"])
    result, report = run(before)
    assert result.ret == 0
    row = report["checks"][1]
    assert (row["name"], row["outcome"], row["remedy"]) == (
        "drift from 16bit to cpu",
        "warned",
        "recalibrate the threshold in cpu",
    )
    shift = -3 / pstdev(first["scores"][0]["values"])
    assert f"shift {shift:.3f}" in row["measured"]
    result.stdout.fnmatch_lines(
        [
            "warned   drift from 16bit to cpu *",
            "*recalibrate the threshold in cpu",
            "READY: 1 check passed, 1 warning*",
        ]
    )
    assert "recalibrate the threshold in cpu" in (pytester.path / "out/report.html").read_text()
    table = kept(pytester)["drift"]
    assert [(line["base"], line["tier"]) for line in table] == [("16bit", "cpu")]
    assert kept(pytester)["scores"][0] == before["scores"][0]


def test_shifted_scores_of_the_same_tier_fail_and_are_not_taken_over(
    run: Run, pytester: pytest.Pytester, first: dict[str, Any]
) -> None:
    before = changed(first, lambda values: [v + 3 for v in values])
    result, report = run(before)
    assert result.ret == 1
    assert report["reasons"] == [
        "scores in cpu are not those of an earlier run; pytest -m quick, for the copies between "
        "GPUs and their arithmetic; if the earlier run was the wrong one, delete drift.json"
    ]
    assert kept(pytester) == before
    # Trying again must not help.
    assert run()[0].ret == 1


def test_reordered_ranks_ask_for_another_probe(run: Run, first: dict[str, Any]) -> None:
    before = changed(first, lambda values: values[::-1], tier="16bit")
    row = run(before)[1]["checks"][1]
    assert (row["outcome"], row["remedy"]) == ("warned", "fit the probe again in cpu")


def test_a_damaged_file_stops_the_run_and_stays(run: Run, pytester: pytest.Pytester) -> None:
    result, report = run('{"schema": 1, "scores": [')
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert report == {}
    result.stderr.fnmatch_lines(
        [
            "ERROR: out/drift.json: is not JSON (*); repair it, move it away, or name another "
            "--gpu-report folder"
        ]
    )
    assert (pytester.path / "out" / "drift.json").read_text() == '{"schema": 1, "scores": ['


def test_another_probe_s_scores_are_not_compared_and_stay(
    run: Run, pytester: pytest.Pytester, first: dict[str, Any]
) -> None:
    before = changed(first, list, probe="other")
    result, report = run(before)
    assert result.ret == 0
    assert report["checks"][1]["reason"] == "drift.json holds only scores of another probe"
    own = first["scores"][0]["probe"]
    assert [row["probe"] for row in kept(pytester)["scores"]] == ["other", own]


def test_a_score_that_is_no_number_fails_and_is_not_kept(
    run: Run, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pytest_multigpu.probes import drift, scoring

    real = scoring.score_tokens

    def spoiled(*arguments: Any, **options: Any) -> Any:
        import dataclasses

        return [dataclasses.replace(s, value=float("nan")) for s in real(*arguments, **options)]

    monkeypatch.setattr(drift, "score_tokens", spoiled)
    result, report = run()
    assert result.ret == 1
    assert report["reasons"][0].startswith("60 of 60 scores are no number; ")
    assert not (pytester.path / "out" / "drift.json").exists()


def test_scores_that_cannot_be_kept_are_said_last(
    run: Run, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damaged while the run went on: it stays as it is, and the run is not READY."""
    from pytest_multigpu import session

    real = session.GpuSession.score_texts

    def spoiling(self: Any) -> Any:
        found = real(self)
        (pytester.path / "out" / "drift.json").write_text("{")
        return found

    # The check's own look at the file comes first.
    monkeypatch.setattr(session.GpuSession, "earlier_scores", ())
    monkeypatch.setattr(session.GpuSession, "score_texts", spoiling)
    result, report = run()
    assert result.ret == 1
    assert report["reasons"][0].startswith("out/drift.json: is not JSON (")
    assert result.outlines[-1] == report["line"]
    assert (pytester.path / "out" / "drift.json").read_text() == "{"


def test_only_ready_runs_are_kept(run: Run, pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_own="import pytest\n@pytest.mark.quick\ndef test_it(): assert 0")
    assert run(None, "test_own.py")[0].ret == 1
    assert not (pytester.path / "out" / "drift.json").exists()


def test_the_baseline_takes_the_scores(run: Run, pytester: pytest.Pytester) -> None:
    result, _ = run(None, "--gpu-baseline=b.json", "--gpu-baseline-update")
    assert result.ret == 0
    (values,) = json.loads((pytester.path / "b.json").read_text())["baselines"].values()
    scores = {name: row for name, row in values.items() if row["kind"] == "score"}
    assert [name.split()[:2] for name in scores] == [["mean", "score"], ["score", "deviation"]]
    result, report = run(None, "--gpu-baseline=b.json", "--gpu-baseline-rule=score:0.1")
    assert result.ret == 0
    rows = [row for row in report["checks"] if row["name"].endswith("against the baseline")]
    assert [row["outcome"] for row in rows] == ["passed", "passed"]


def test_under_xdist_the_controller_keeps_the_worker_s_scores(
    run: Run, pytester: pytest.Pytester
) -> None:
    pytest.importorskip("xdist")
    for under, names in ((["-n1", "-p", "xdist"], []), ([], ["scores against an earlier run"])):
        result, report = run(None, *under)
        assert result.ret == 0
        assert [row["name"] for row in report["checks"]][1:] == names
        assert len(kept(pytester)["scores"]) == 1
