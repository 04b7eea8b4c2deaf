"""Verdicts about greedy generation. Imports records."""

from __future__ import annotations

from math import inf, isnan
from typing import Final

from ..records.check import Record
from ..records.generation import SLOW, GenerationReading, Timing
from ..records.plan import Tier

CUDNN_REMEDY: Final = "torch.backends.cuda.enable_cudnn_sdp(False)"

_ERRORS: Final = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.2}
_QUANTISED_ERROR: Final = 0.3


def tolerance_for(tier: Tier, dtype: str) -> float:
    """Largest relative RMS error of one position's logits between one-token and many-token passes.

    A wrong position or a stale cache gives logits of other text: for independent logits the
    figure is 1.41. int8 quantises activations a batch at a time, hence its wider limit.
    """
    if tier in ("4bit", "8bit"):
        return _QUANTISED_ERROR
    return _ERRORS.get(dtype, _ERRORS["bfloat16"])


def judge_generation(reading: GenerationReading, tolerance: float) -> list[Record]:
    """The same twice, finite logits, cached equals uncached, and the attention-plan trap."""
    records = [_same(reading, tolerance), _finite(reading), _agrees(reading, tolerance)]
    if reading.cudnn_attention is not None:
        records.append(_new_lengths(reading))
    return records


def _same(reading: GenerationReading, tolerance: float) -> Record:
    """Tokens and, since a few tokens can be equal by chance, logits."""
    first, second = reading.first_tokens, reading.second_tokens
    differ = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
    errors = () if reading.nonfinite_positions else reading.repeat_errors
    far = [i for i, error in enumerate(errors) if not error <= tolerance]
    measured, reason = f"{len(first)} equal tokens", ""
    if first != second or not first:
        where = f"token {differ + 1}" if differ is not None else "their length"
        measured = f"different from {where} on"
        reason = f"two greedy generations of the same prompt differ at {where}"
    elif far:
        measured += ", different logits"
        reason = (
            f"two greedy generations of the same prompt differ: the logits of {len(far)} of "
            f"{len(errors)} tokens by more than {tolerance:g} of their spread, first at new token "
            f"{far[0] + 1}"
        )
    return Record(
        name="greedy twice",
        outcome="failed" if reason else "passed",
        expected="equal tokens",
        measured=measured,
        reason=reason,
        remedy="run the interconnect checks: wrong copies between GPUs do this "
        "(pytest --pyargs pytest_multigpu.checks -k interconnect)"
        if reason
        else "",
    )


def _finite(reading: GenerationReading) -> Record:
    bad = reading.nonfinite_positions
    good = not bad and reading.positions > 0
    return Record(
        name="finite logits",
        outcome="passed" if good else "failed",
        expected="every logit finite",
        measured=f"{reading.positions - len(bad)} of {reading.positions} positions finite",
        reason=""
        if good
        else f"NaN or infinity at {len(bad)} positions, first {bad[0]}"
        if bad
        else "no position was looked at",
        remedy="" if good else "use bfloat16 in place of float16, or check the weights",
    )


def _agrees(reading: GenerationReading, tolerance: float) -> Record:
    agreement = reading.agreement
    # "not <=" so that NaN fails.
    far = [i for i, error in enumerate(agreement.relative_errors) if not error <= tolerance]
    errors = agreement.relative_errors
    good = bool(errors) and not far and not agreement.differing_tokens
    worst = max(errors, key=lambda error: inf if isnan(error) else error, default=None)
    reason = ""
    if far:
        reason = (
            f"the logits of {len(far)} of {len(errors)} tokens differ from an uncached forward by "
            f"more than {tolerance:g} of their spread, first at new token {far[0] + 1}"
        )
    elif agreement.differing_tokens:
        reason = f"{agreement.differing_tokens} clear tokens differ from an uncached forward"
    elif not errors:
        reason = "no token was compared"
    return Record(
        name="cached equals uncached",
        outcome="passed" if good else "failed",
        expected=f"at most {tolerance:g}",
        measured=worst if worst is None else round(worst, 4),
        unit="logit spreads",
        reason=reason,
        remedy=""
        if good
        else "run the interconnect checks; if they pass, try another attn_implementation",
    )


def _new_lengths(reading: GenerationReading) -> Record:
    name = "speed at new lengths"
    first, repeat = reading.first.step_seconds, reading.repeat.step_seconds
    if not first or not repeat:
        return Record(name=name, outcome="unknown", reason="no decode step was timed")
    again, without = _timed(reading.new_lengths), _timed(reading.without_cudnn)
    judged = again or reading.first
    measured = f"{_ms(first)} first, {_ms(repeat)} repeated"
    for timing, where in ((again, "at more new lengths"), (without, "with cuDNN attention off")):
        seconds = timing and timing.step_seconds
        measured += f", {_ms(seconds)} {where}" if seconds else ""
    slow = judged.is_slow_beside(reading.repeat)
    if slow:
        reason, remedy = _why_slow(judged, without, reading.repeat)
    else:
        once = reading.first.is_slow_beside(reading.repeat)
        reason, remedy = "only the first pass was slower" if once else "", ""
    return Record(
        name=name,
        outcome="warned" if slow else "passed",
        expected=f"at most {SLOW:g} times the repeat",
        measured=measured,
        reason=reason,
        remedy=remedy,
    )


def _why_slow(judged: Timing, without: Timing | None, repeat: Timing) -> tuple[str, str]:
    """Reason and remedy.

    :param without: with cuDNN attention off.
    """
    slower = f"decode is {judged.times(repeat):.1f} times slower at lengths not met before"
    # Gone with the remedy, or a third of the whole is.
    if without is not None and (
        not without.is_slow_beside(repeat) or judged.is_slow_beside(without)
    ):
        return f"{slower}: cuDNN attention plans each length anew", CUDNN_REMEDY
    why = "cuDNN attention is not the cause" if without is not None else "the cause is not known"
    return (
        f"{slower}; {why}",
        "look for what compiles or plans for each length, and for other work on these GPUs",
    )


def _timed(timing: Timing | None) -> Timing | None:
    return timing if timing is not None and timing.step_seconds else None


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms/token"
