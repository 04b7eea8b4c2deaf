"""Readings of a probe on a model against what must hold. Pure: imports records only."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from ..records.check import Outcome, Record
from ..records.probe import (
    ArithmeticReading,
    BoundaryReading,
    HookReading,
    LayerReading,
    PlantReading,
    ProbeFit,
    ShiftReading,
    SizeReading,
    SpanReading,
)

RATIO_LOW, RATIO_HIGH = 0.5, 2.0
MAX_RELATIVE_ERROR = 1e-5
PLANT_TOLERANCE = 0.02
MIN_COSINE = 0.99
_LIMITS = {"float32": (1e-3, 1e-2), "16bit": (0.1, 0.5), "4bit": (0.15, 0.75), "8bit": (0.25, 1.0)}
_OWN_PROBE = "--gpu-probe=FILE with a probe of this model"


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


def judge_fit(fit: ProbeFit) -> list[Record]:
    """Hidden size, layers and model id."""
    return [_hidden(fit), _layers(fit), *_model_id(fit)]


def _hidden(fit: ProbeFit) -> Record:
    good = fit.probe_hidden == fit.model_hidden
    return Record(
        name="probe hidden size",
        outcome="passed" if good else "failed",
        expected=fit.model_hidden,
        measured=fit.probe_hidden,
        reason="" if good else "the probe was fitted on a model of another hidden size",
        remedy="" if good else _OWN_PROBE,
    )


def _layers(fit: ProbeFit) -> Record:
    outside = [layer for layer in fit.probe_layers if not 0 <= layer <= fit.model_layers]
    text = ", ".join(map(str, outside))
    return Record(
        name="probe layers",
        outcome="failed" if outside else "passed",
        expected=f"hidden_states 0 to {fit.model_layers}",
        measured=", ".join(map(str, fit.probe_layers)),
        reason=f"layer {text} is out of range for {fit.model_layers} layers" if outside else "",
        remedy=_OWN_PROBE if outside else "",
    )


def _model_id(fit: ProbeFit) -> list[Record]:
    if fit.probe_model is None:
        return []
    outcome: Outcome
    is_path = fit.model.startswith((".", "/", "~")) or fit.model.count("/") > 1
    (wanted,), names = _bare_names(fit.probe_model)[-1:], _bare_names(fit.model)
    names = names if is_path else names[-1:]
    if wanted and wanted in names:
        outcome, reason = "passed", ""
    elif any(min(len(wanted), len(n)) >= 4 and (wanted in n or n in wanted) for n in names):
        outcome, reason = "warned", "by its name the probe was fitted on a variant of the model"
    elif is_path:
        outcome, reason = "warned", "the model is a folder, whose name does not tell which it is"
    else:
        outcome, reason = "failed", "the probe was fitted on another model"
    return [
        Record(
            name="probe model",
            outcome=outcome,
            expected=fit.probe_model,
            measured=fit.model,
            reason=reason,
            remedy=_OWN_PROBE if reason else "",
        )
    ]


_STORAGE = re.compile(
    r"(?<![a-z])(instruct|meta|hf|bnb|nf4|int8|bf16|fp16|[48]bit)(?![a-z0-9])", re.ASCII
)


def _bare_names(name: str) -> list[str]:
    """The parts of a hub id or a path, each without punctuation, ``meta``, ``instruct`` and what
    only tells how weights are stored. Points between digits stay: 1.3b is not 13b."""
    parts = re.split(r"[/\\]|--", name.lower().rstrip("/\\"))
    bare = [_STORAGE.sub("", part) for part in parts]
    return [re.sub(r"(?<!\d)\.|\.(?!\d)|[^a-z0-9.]", "", part) for part in bare]


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
        measured=f"{reading.differing} values differ" if reading.differing else "equal bits",
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
        remedy="pytest -m quick, for the copies between GPUs" if bad else "",
    )


def judge_boundary(reading: BoundaryReading) -> Record:
    """What a GPU gets is what the one before it sent."""
    path = f"{people(reading.source)} -> {people(reading.target)}"
    return Record(
        name="activations between GPUs",
        outcome="failed" if reading.differing else "passed",
        expected="equal bits",
        measured=f"{reading.differing} values differ" if reading.differing else "equal bits",
        device=path,
        reason=f"hidden_states[{reading.layer}] changes on its way" if reading.differing else "",
        remedy="pytest -m quick, for the copies between GPUs" if reading.differing else "",
    )


def judge_site(site: str) -> Record:
    """A probe that was fitted somewhere and does not tell how large activations were there."""
    return Record(
        name="probe site",
        outcome="warned",
        expected="a scaler that tells where it was fitted",
        measured=f"{site}, by its file alone",
        reason="the probe has no scaler, so nothing tells whether its layer and site are right",
        remedy="add mean and scale of the activations that it was fitted on to the probe's JSON",
    )


def judge_size(readings: Sequence[SizeReading], *, from_scaler: bool = True) -> Record:
    """Activations are as large as the probe's scaler saw them; if not, where they would be.

    :param from_scaler: False where the probe has none and the size is that of other texts.
    """
    own = [reading for reading in readings if reading.is_probe]
    fitting = sorted(
        (r for r in readings if RATIO_LOW <= r.ratio <= RATIO_HIGH and not r.is_probe),
        key=lambda r: abs(math.log(r.ratio)),
    )
    wrong = [r for r in own if not RATIO_LOW <= r.ratio <= RATIO_HIGH]
    reason = remedy = ""
    if wrong:
        first = wrong[0]
        reason = (
            f"activations at layer {first.layer}, site {first.site}, are {first.ratio:.3g} times "
            f"the size {'that the probe was fitted on' if from_scaler else 'on other texts'}"
        )
        if fitting:
            best = fitting[0]
            reason += f"; layer {best.layer}, site {best.site}, would fit ({best.ratio:.3g})"
            remedy = f"set layer {best.layer} and site {best.site} in the probe's JSON"
        else:
            reason += "; no neighbouring layer or site would fit"
            remedy = _OWN_PROBE
    return Record(
        name="activation size" if from_scaler else "activation size, against other texts",
        outcome="failed" if wrong else "passed" if own else "unknown",
        expected=f"{RATIO_LOW:g} to {RATIO_HIGH:g}",
        measured=(wrong or own)[0].ratio if own else None,
        unit="times",
        reason=reason or ("" if own else "the probe's own layer was not read"),
        remedy=remedy,
    )
