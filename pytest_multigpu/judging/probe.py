"""Readings of a probe's scores against what must hold; whether it belongs to the model is
:mod:`.probe_fit`'s. Pure: imports records and that module."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..records.check import Outcome, Record
from ..records.probe import (
    ArithmeticReading,
    BoundaryReading,
    HookReading,
    LayerReading,
    PlantReading,
    ShiftReading,
    SpanReading,
)
from .probe_fit import COPIES

MAX_RELATIVE_ERROR = 1e-5
PLANT_TOLERANCE = 0.02
MIN_COSINE = 0.99
EQUAL = "equal bits"
_LIMITS = {"float32": (1e-3, 1e-2), "16bit": (0.1, 0.5), "4bit": (0.15, 0.75), "8bit": (0.25, 1.0)}


def shift_limits(dtype: str, tier: str) -> tuple[float, float]:
    """Allowed ``(mean, token)`` shift in standard deviations. Other batch shapes take other
    kernels, which round differently: bfloat16 measured 0.013 and 0.094; int8 picks its outlier
    columns from the whole batch."""
    if tier in ("4bit", "8bit"):
        return _LIMITS[tier]
    return _LIMITS["float32"] if dtype == "float32" else _LIMITS["16bit"]


def people(device: str) -> str:
    """``cuda:2`` as ``GPU 2``; ``cpu`` as ``CPU``."""
    return f"GPU {device[5:]}" if device.startswith("cuda:") else device.upper()


def judge_hook(reading: HookReading) -> Record:
    """The scorer reads ``hidden_states[layer]`` bit for bit, and not a neighbour's."""
    where = f"hidden_states[{reading.layer}]"
    reason = remedy = ""
    if reading.same_neighbours:
        reason = f"{where} can't be told from hidden_states[{reading.same_neighbours[0]}]"
        remedy = "check the block between them: it changes nothing"
    if reading.differing:
        reason = f"the scorer's activations at site {reading.site} are not {where}"
        remedy = "check the layer index, the site and what hooks the model carries"
    return Record(
        name=f"hook at layer {reading.layer}",
        outcome="failed" if reason else "passed",
        expected="equal bits, unlike its neighbours",
        measured=f"{reading.differing} values differ" if reading.differing else EQUAL,
        device=people(reading.device),
        reason=reason,
        remedy=remedy,
    )


def judge_span(reading: SpanReading) -> Record:
    """Exactly the tokens that the probe's rule names are scored."""
    good = reading.expected == reading.found
    lacking = len(set(reading.expected) - set(reading.found))
    extra = len(set(reading.found) - set(reading.expected))
    return Record(
        name="scored tokens",
        outcome="passed" if good else "failed",
        expected=f"{len(reading.expected)} tokens",
        measured=f"{len(reading.found)} tokens",
        reason="" if good else f"{lacking} tokens are not scored that must be, {extra} wrongly are",
        remedy="" if good else "check the probe's token mask against the model's chat template",
    )


def judge_arithmetic(reading: ArithmeticReading) -> Record:
    """float32 on the device agrees with float64."""
    good = reading.relative_error <= MAX_RELATIVE_ERROR
    return Record(
        name=f"score arithmetic, {reading.form}",
        outcome="passed" if good else "failed",
        expected=f"at most {MAX_RELATIVE_ERROR:g}",
        measured=reading.relative_error,
        unit="relative error",
        device=people(reading.device),
        reason="" if good else "the score differs from a float64 computation of it",
        remedy="" if good else "check the probe's mean, scale and bias",
    )


def judge_plant(reading: PlantReading) -> Record:
    """A planted direction moves its tokens' scores by what it must, and no others."""
    off = abs(reading.measured_shift - reading.expected_shift)
    reason = ""
    if not math.isfinite(off) or off > PLANT_TOLERANCE * abs(reading.expected_shift):
        reason = "the planted tokens' scores do not move by what was planted"
    elif reading.elsewhere > PLANT_TOLERANCE * abs(reading.expected_shift):
        reason = "scores of tokens without the planted direction move too"
    elif not reading.cosine >= MIN_COSINE:
        reason = f"the recovered direction has cosine {reading.cosine:.3f} with the planted one"
    return Record(
        name=f"planted direction at layer {reading.layer}",
        outcome="failed" if reason else "passed",
        expected=reading.expected_shift,
        measured=reading.measured_shift,
        unit="score",
        device=people(reading.device),
        reason=reason,
        remedy="check that the scorer reads this layer and every row" if reason else "",
    )


def judge_shift(reading: ShiftReading, limits: tuple[float, float]) -> Record:
    """Scoring in another way changes scores by rounding only. ``limits``: ``(mean, token)``."""
    good = reading.mean_shift <= limits[0] and reading.token_shift <= limits[1]
    return Record(
        name=f"scores, {reading.way}",
        outcome="passed" if good else "failed",
        expected=f"mean {limits[0]:g}, token {limits[1]:g} at most",
        measured=f"mean {reading.mean_shift:.2g}, token {reading.token_shift:.2g}",
        unit="standard deviations",
        reason="" if good else f"scores change when the same text is scored {reading.way}",
        remedy="" if good else "score one text at a time and compare; check copies between GPUs",
    )


def judge_layers(readings: Sequence[LayerReading]) -> Record:
    """Every layer's activations are finite, and no token's are all zero."""
    bad = [reading for reading in readings if reading.not_finite or reading.zero]
    reason, device = "", ""
    if bad:
        first = bad[0]
        device = people(first.device)
        count, what = (first.zero, "zero") if first.zero else (first.not_finite, "not finite")
        reason = (
            f"hidden_states[{first.layer}] on {device} is {what} at {count} of {first.tokens} "
            f"tokens; {len(bad)} of {len(readings)} layers are affected"
        )
    return Record(
        name="activations at every layer",
        outcome="failed" if bad else "passed" if readings else "unknown",
        expected="finite and non-zero",
        measured=f"{len(readings) - len(bad)} of {len(readings)} layers",
        device=device,
        reason=reason or ("" if readings else "no layer was read"),
        remedy=COPIES if bad else "",
    )


def judge_boundary(reading: BoundaryReading) -> Record:
    """What a GPU gets is what the one before it sent."""
    outcome: Outcome = "failed" if reading.differing else "passed"
    measured: str | None = f"{reading.differing} values differ" if reading.differing else EQUAL
    reason = f"hidden_states[{reading.layer}] changes on its way" if reading.differing else ""
    if reading.differing is None:
        outcome, measured = "unknown", None
        reason = (
            f"what the block after hidden_states[{reading.layer}] was given can't be seen in this "
            "architecture"
        )
    return Record(
        name="activations between GPUs",
        outcome=outcome,
        expected=EQUAL,
        measured=measured,
        device=f"{people(reading.source)} -> {people(reading.target)}",
        reason=reason,
        remedy=COPIES if reason else "",
    )
