"""Scores of the text set: sound by themselves, and beside those of other tiers and earlier runs.

The rule. Another tier's scores: what moves them enough to matter is a warning with advice, never
silence. The same tier's: bits were equal on 1, 2 and 4 H100s and on H200s, so with the same GPUs
and versions every difference is a warning, and one beyond rounding a failure; with other GPUs
rounding is allowed; with other versions a difference beyond rounding is a warning, since
software may change what it computes. Pure: imports records and errors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean, pstdev

from ..errors import one_line
from ..records.check import Outcome, Record
from ..records.drift import LARGEST, DriftReading, TextScores

MIN_CORRELATION = 0.95
MAX_SHIFT = 0.2
SCALE = (0.8, 1.25)
_QUANTISED = {"4bit": 0, "8bit": 1}
_PARTS = ("model", "weights", "probe", "text set", "tokenizer, chat template or context")

Between = Callable[[Sequence[float], Sequence[float]], DriftReading]
"""Base's and other scores to their difference."""


def judge_drift(
    scores: TextScores,
    earlier: Sequence[TextScores],
    between: Between,
    limits: tuple[float, float],
    *,
    file: str = "drift.json",
) -> list[Record]:
    """This run's scores, then a record for each set of earlier ones that they compare with.

    :param limits: ``(mean, text)``: what rounding may change within one tier, in standard
        deviations.
    :param file: where the earlier ones are kept, for the messages.
    """
    own = judge_scores(scores)
    if own.outcome != "passed":
        return [own]
    records = [own]
    for before in closest(scores, earlier):
        if before.precision == scores.precision:
            reading = between(before.values, scores.values)
            records.append(judge_earlier(before, scores, reading, limits, file=file))
        else:
            base, other = sorted((before, scores), key=rank, reverse=True)
            records.append(judge_tiers(base, other, between(base.values, other.values)))
    if earlier and len(records) == 1:
        records.append(_not_compared(scores, earlier, file))
    return records


def closest(scores: TextScores, earlier: Sequence[TextScores]) -> list[TextScores]:
    """Of each precision the scores of the same subject whose set-up is most like this run's; of
    equally like ones the latest. This run's own precision comes first."""
    best: dict[str, TextScores] = {}
    for one in sorted(earlier, key=lambda one: (_likeness(one, scores), one.when)):
        if one.subject == scores.subject:
            best[one.precision] = one
    own = best.pop(scores.precision, None)
    return ([] if own is None else [own]) + sorted(best.values(), key=rank, reverse=True)


def _likeness(one: TextScores, other: TextScores) -> tuple[bool, bool]:
    return dict(one.versions) == dict(other.versions), one.gpu_kinds == other.gpu_kinds


def rank(scores: TextScores) -> tuple[int, float]:
    """The more bits the better a base; of equal ones what was scored first."""
    return _QUANTISED.get(scores.tier, 2), -scores.when


def judge_scores(scores: TextScores) -> Record:
    """All finite, and not all the same: a probe that reads something."""
    # "<" so that NaN is none.
    finite = [value for value in scores.values if abs(value) < LARGEST]
    reason = remedy = ""
    if len(finite) < len(scores.values) or not finite:
        reason = f"{len(scores.values) - len(finite)} of {len(scores.values)} scores are no number"
        remedy = "run the other probe checks: they tell where it comes from"
    elif not scores.differ:
        reason = "all texts have the same score; the probe reads nothing"
        remedy = "check the probe's direction, layer and token mask"
    measured = None
    if not reason:
        measured = f"mean {fmean(finite):.6g}, standard deviation {pstdev(finite):.4g}"
    return Record(
        name="scores of the text set",
        outcome="failed" if reason else "passed",
        expected=f"{len(scores.values)} scores that differ",
        measured=measured,
        reason=reason,
        remedy=remedy,
    )


def advice(base: str, other: str, reading: DriftReading) -> str:
    """What a drift from one precision to another asks for; empty where the threshold holds."""
    # "not >=" so that NaN asks for it.
    if not reading.rank_correlation >= MIN_CORRELATION:
        return f"{other} ranks texts otherwise than {base}: fit the probe again in {other}"
    if not abs(reading.shift) <= MAX_SHIFT or not SCALE[0] <= reading.scale <= SCALE[1]:
        return (
            f"scores move from {base} to {other} while their ranks hold: "
            f"recalibrate the threshold in {other}"
        )
    return ""


def judge_tiers(base: TextScores, other: TextScores, reading: DriftReading) -> Record:
    """Scores in another precision on the same weights."""
    said = advice(base.precision, other.precision, reading)
    reason, _, remedy = said.partition(": ")
    if said and not all(_likeness(base, other)):
        reason += " (they were scored with other versions or on other GPUs, too)"
    return Record(
        name=f"drift from {base.precision} to {other.precision}",
        outcome="warned" if said else "passed",
        expected=(
            f"rank correlation {MIN_CORRELATION:g} or more, scale {SCALE[0]:g} to {SCALE[1]:g}, "
            f"shift within {MAX_SHIFT:g}"
        ),
        measured=(
            f"rank correlation {reading.rank_correlation:.4f}, scale {reading.scale:.2f}, "
            f"shift {reading.shift:+.3f}, spread {reading.spread:.3f}"
        ),
        unit="standard deviations",
        reason=reason,
        remedy=remedy,
    )


def judge_earlier(
    before: TextScores,
    now: TextScores,
    reading: DriftReading,
    limits: tuple[float, float],
    *,
    file: str,
) -> Record:
    """Scores in the same precision on the same weights: the rule is at the top of this file."""
    versions, gpus = _likeness(before, now)
    # A CPU's kernels depend on its kind and its number of threads, which nobody noted.
    same_setup = versions and gpus and bool(now.gpus)
    rounding = abs(reading.shift) <= limits[0] and reading.largest <= limits[1]
    outcome: Outcome = "passed"
    reason = remedy = ""
    doubt = "pytest -m quick, for the copies between GPUs and their arithmetic"
    if not rounding and not versions:
        outcome = "warned"
        reason = f"scores in {now.precision} move with the versions: {_changes(before, now)}"
        remedy = f"recalibrate the threshold, or install the versions that {file} names"
    elif not rounding:
        outcome = "failed"
        reason = f"scores in {now.precision} are not those of an earlier run"
        reason += "" if gpus else f" on {one_line(' + '.join(sorted(before.gpu_kinds))) or 'a CPU'}"
        remedy = f"{doubt}; if the earlier run was the wrong one, delete {file}"
    elif same_setup and not reading.equal:
        outcome = "warned"
        reason = (
            "scores differ from those of an earlier run with the same GPUs and versions; "
            "on sound machines they are equal to the bit"
        )
        remedy = f"run again, and if they differ again: {doubt}"
    return Record(
        name="scores against an earlier run",
        outcome=outcome,
        expected="equal bits" if same_setup else f"mean {limits[0]:g}, text {limits[1]:g} at most",
        measured="equal bits"
        if reading.equal
        else f"mean {reading.shift:+.2g}, text {reading.largest:.2g}",
        unit="standard deviations",
        reason=reason,
        remedy=remedy,
    )


def _changes(before: TextScores, now: TextScores) -> str:
    """``torch 2.10 to 2.11``."""
    names = sorted({*before.versions, *now.versions})
    pairs = [(name, before.versions.get(name), now.versions.get(name)) for name in names]
    text = ", ".join(f"{n} {a or 'none'} to {b or 'none'}" for n, a, b in pairs if a != b)
    return one_line(text)


def _not_compared(scores: TextScores, earlier: Sequence[TextScores], file: str) -> Record:
    """None of the earlier scores is about the same thing; they stay in the file."""

    def others(one: TextScores) -> list[str]:
        pairs = zip(_PARTS, one.subject, scores.subject, strict=True)
        return [part for part, a, b in pairs if a != b]

    nearest = min(map(others, earlier), key=len)
    return Record(
        name="drift",
        outcome="warned",
        expected="scores of this probe on these weights",
        measured="none, nothing compared",
        reason=f"{file} holds only scores of another {' and another '.join(nearest)}",
        remedy="give --gpu-report the folder of an earlier run with this probe, or ignore this",
    )
