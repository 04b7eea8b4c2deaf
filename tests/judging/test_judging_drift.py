"""The rule on drift: other tiers warn, the same tier must be what it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from report_examples import text_scores

from pytest_multigpu.judging.drift import advice, closest, judge_drift, judge_scores
from pytest_multigpu.probes.drift import drift_between
from pytest_multigpu.records.check import Record
from pytest_multigpu.records.drift import DriftReading, TextScores

LIMITS = (0.1, 0.5)
NOW = text_scores(when=2.0)
"""Mean 1.5, standard deviation 1.118."""
QUICK = "pytest -m quick, for the copies between GPUs and their arithmetic"


def judged(now: TextScores, *earlier: TextScores) -> list[Record]:
    """Without the record of the scores by themselves."""
    own, *others = judge_drift(now, earlier, drift_between, LIMITS, file="out/drift.json")
    assert own.outcome == "passed"
    return others


def one(now: TextScores, *earlier: TextScores) -> Record:
    (record,) = judged(now, *earlier)
    return record


def test_the_first_run_has_nothing_to_compare_with() -> None:
    assert judge_drift(NOW, (), drift_between, LIMITS) == [
        Record(
            name="scores of the text set",
            outcome="passed",
            expected="4 scores that differ",
            measured="mean 1.5, standard deviation 1.118",
        )
    ]


@pytest.mark.parametrize(
    ("values", "reason", "remedy"),
    [
        (
            (0.0, float("nan"), 2.0, float("inf")),
            "2 of 4 scores are no number",
            "run the other probe checks: they tell where it comes from",
        ),
        (
            (0.5, 0.5, 0.5, 0.5),
            "all texts have the same score; the probe reads nothing",
            "check the probe's direction, layer and token mask",
        ),
        (
            (1e60, 1.0, 2.0, 3.0),
            "1 of 4 scores are no number",
            "run the other probe checks: they tell where it comes from",
        ),
        (
            (),
            "0 of 0 scores are no number",
            "run the other probe checks: they tell where it comes from",
        ),
    ],
)
def test_bad_scores_fail_and_are_not_compared(
    values: tuple[float, ...], reason: str, remedy: str
) -> None:
    (record,) = judge_drift(replace(NOW, values=values), (NOW,), drift_between, LIMITS)
    assert (record.outcome, record.reason, record.remedy) == ("failed", reason, remedy)
    assert record.measured is None


def test_drift_to_another_tier_is_a_warning_with_advice() -> None:
    shifted = replace(NOW, tier="8bit", values=(1.0, 2.0, 3.0, 4.0), when=3.0)
    assert one(shifted, NOW) == Record(
        name="drift from 16bit to 8bit",
        outcome="warned",
        expected="rank correlation 0.95 or more, scale 0.8 to 1.25, shift within 0.2",
        measured="rank correlation 1.0000, scale 1.00, shift +0.894, spread 0.000",
        unit="standard deviations",
        reason="scores move from 16bit to 8bit while their ranks hold",
        remedy="recalibrate the threshold in 8bit",
    )
    reordered = replace(NOW, tier="4bit", values=(3.0, 1.0, 2.0, 0.0))
    record = one(reordered, NOW)
    assert (record.outcome, record.reason, record.remedy) == (
        "warned",
        "4bit ranks texts otherwise than 16bit",
        "fit the probe again in 4bit",
    )
    stretched = replace(NOW, tier="4bit", values=(-0.5, 0.85, 2.15, 3.5))
    assert one(stretched, NOW).reason == "scores move from 16bit to 4bit while their ranks hold"
    # Where the threshold holds, the figures are shown and nothing is asked for.
    near = replace(NOW, tier="8bit", values=(0.0, 1.01, 2.0, 3.0))
    record = one(near, NOW)
    assert (record.outcome, record.reason, record.remedy) == ("passed", "", "")
    assert str(record.measured).startswith("rank correlation 1.0000, scale 1.00, shift +0.00")


def test_the_better_tier_is_the_base_whichever_ran_first() -> None:
    eight = replace(NOW, tier="8bit", values=(1.0, 2.0, 3.0, 4.0), when=1.0)
    record = one(NOW, eight)
    assert (record.name, record.remedy) == (
        "drift from 16bit to 8bit",
        "recalibrate the threshold in 8bit",
    )
    half = replace(NOW, dtype="float16", when=3.0)
    assert one(half, NOW).name == "drift from 16bit to 16bit float16"
    four = replace(NOW, tier="4bit")
    names = [record.name for record in judged(four, eight, NOW)]
    assert names == ["drift from 16bit to 4bit", "drift from 8bit to 4bit"]


@pytest.mark.parametrize(
    ("reading", "asked"),
    [
        ({"rank_correlation": 0.95, "shift": 0.2, "scale": 1.25}, False),
        ({"rank_correlation": 0.95, "shift": -0.2, "scale": 0.8}, False),
        ({"rank_correlation": 0.9499}, True),
        ({"rank_correlation": float("nan")}, True),
        ({"shift": 0.2001}, True),
        ({"shift": -0.2001}, True),
        ({"shift": float("nan")}, True),
        ({"scale": 0.7999}, True),
        ({"scale": 1.2501}, True),
        ({"scale": float("nan")}, True),
    ],
)
def test_limits_between_tiers(reading: dict[str, float], asked: bool) -> None:
    figures = {"rank_correlation": 1.0, "shift": 0.0, "scale": 1.0} | reading
    found = DriftReading(texts=4, spread=0.0, largest=0.0, equal=False, **figures)
    assert bool(advice("16bit", "8bit", found)) is asked


def test_other_versions_are_told_beside_a_drift_between_tiers() -> None:
    old = replace(NOW, versions={"torch": "2.10.0"})
    record = one(replace(NOW, tier="8bit", values=(1.0, 2.0, 3.0, 4.0)), old)
    assert record.reason.endswith(
        "their ranks hold (they were scored with other versions or on other GPUs, too)"
    )


def shifted(amount: float, **changes: object) -> TextScores:
    values = tuple(value + amount for value in NOW.values)
    return replace(NOW, values=values, **changes)  # type: ignore[arg-type]


def test_the_same_setup_gives_equal_bits() -> None:
    before = replace(NOW, gpus=("NVIDIA H100 80GB HBM3",) * 4)  # the split changes no bit
    assert one(NOW, before) == Record(
        name="scores against an earlier run",
        outcome="passed",
        expected="equal bits",
        measured="equal bits",
        unit="standard deviations",
    )
    record = one(shifted(1e-12), before)
    assert (record.outcome, record.measured) == ("warned", "mean +8.9e-13, text 8.9e-13")
    assert record.reason == (
        "scores differ from those of an earlier run with the same GPUs and versions; on sound "
        "machines they are equal to the bit"
    )
    assert record.remedy == f"run again, and if they differ again: {QUICK}"
    record = one(shifted(0.2), before)
    assert (record.outcome, record.reason, record.remedy) == (
        "failed",
        "scores in 16bit are not those of an earlier run",
        f"{QUICK}; if the earlier run was the wrong one, delete out/drift.json",
    )


def test_other_gpus_may_round_otherwise() -> None:
    before = replace(NOW, gpus=("NVIDIA A100",))
    record = one(shifted(0.05), before)
    assert (record.outcome, record.expected) == ("passed", "mean 0.1, text 0.5 at most")
    record = one(shifted(0.2), before)
    assert (record.outcome, record.reason) == (
        "failed",
        "scores in 16bit are not those of an earlier run on NVIDIA A100",
    )
    assert one(shifted(0.2), replace(NOW, gpus=())).reason.endswith(" on a CPU")


def test_a_cpu_may_round_otherwise() -> None:
    before = replace(NOW, tier="cpu", gpus=())
    assert one(shifted(0.05, tier="cpu", gpus=()), before).outcome == "passed"
    assert one(shifted(0.2, tier="cpu", gpus=()), before).outcome == "failed"


def test_other_versions_may_compute_otherwise() -> None:
    before = replace(NOW, versions={"torch": "2.10.0", "gone": "1"})
    assert one(shifted(0.05), before).outcome == "passed"
    record = one(shifted(0.2), before)
    assert (record.outcome, record.reason, record.remedy) == (
        "warned",
        "scores in 16bit move with the versions: gone 1 to none, torch 2.10.0 to 2.11.0",
        "recalibrate the threshold, or install the versions that out/drift.json names",
    )


def test_one_text_alone_may_not_move_far() -> None:
    """The mean of all hides it: 0.6 standard deviations on one text of 40, 0.015 on average."""
    many = tuple(float(i) for i in range(40))
    before = replace(NOW, values=many, gpus=("NVIDIA A100",))
    spread = (sum((v - 19.5) ** 2 for v in many) / 40) ** 0.5
    for times, outcome in ((0.499, "passed"), (0.501, "failed")):
        moved = replace(NOW, values=(many[0] + times * spread, *many[1:]))
        assert one(moved, before).outcome == outcome


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"probe": "other"}, "probe"),
        ({"model": "llama-3.1-8b"}, "model"),
        ({"weights": "checkpoint 1"}, "weights"),
        ({"texts": "alibi-60 2"}, "text set"),
        ({"tokens": "other"}, "tokenizer, chat template or context"),
        ({"probe": "x", "model": "y"}, "model and another probe"),
    ],
)
def test_scores_of_something_else_are_not_compared_and_it_is_said(
    changes: dict[str, str], what: str
) -> None:
    other = replace(NOW, **changes)  # type: ignore[arg-type]
    farther = replace(other, model="m", weights="w", probe="p")
    assert one(NOW, farther, other) == Record(
        name="drift",
        outcome="warned",
        expected="scores of this probe on these weights",
        measured="none, nothing compared",
        reason=f"out/drift.json holds only scores of another {what}",
        remedy="give --gpu-report the folder of an earlier run with this probe, or ignore this",
    )
    # With its own there, they are nobody's concern.
    assert [record.name for record in judged(NOW, NOW, other)] == ["scores against an earlier run"]


def names(found: Sequence[TextScores]) -> list[float]:
    return [scores.when for scores in found]


def test_the_most_like_and_then_the_latest_is_compared_with() -> None:
    other_gpu = replace(NOW, gpus=("NVIDIA A100",), when=10.0)
    other_torch = replace(NOW, versions={"torch": "2.10.0"}, when=20.0)
    same, later = replace(NOW, when=5.0), replace(NOW, when=6.0)
    assert names(closest(NOW, [other_gpu, later, same, other_torch])) == [6.0]
    assert names(closest(NOW, [other_gpu, other_torch])) == [10.0]
    assert names(closest(NOW, [other_torch])) == [20.0]
    eight = [replace(one, tier="8bit", when=one.when + 100) for one in (other_torch, same)]
    assert names(closest(NOW, [*eight, same])) == [5.0, 105.0]


def test_text_from_a_file_stays_on_the_line() -> None:
    before = replace(NOW, versions={"torch": "2\n\x1b[2J"})
    assert one(shifted(0.2), before).reason == (
        "scores in 16bit move with the versions: torch 2\\n\\x1b[2J to 2.11.0"
    )


def test_scores_by_themselves() -> None:
    assert judge_scores(NOW).outcome == "passed"
