"""Does a probe belong to a model: hidden size, layers, model id, and how large activations are.

Pure: imports records only.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Sequence

from ..records.check import Outcome, Record
from ..records.probe import ProbeFit, SizeReading

RATIO_LOW, RATIO_HIGH = 0.5, 2.0
_OWN_PROBE = "--gpu-probe=FILE with a probe of this model"
COPIES = "pytest -m quick, for the copies between GPUs"
SIZE = "activation size"
MOVED = "moved.safetensors"
"""Where the command that a remedy names writes to."""


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


def judge_size(
    readings: Sequence[SizeReading], *, source: str = "", from_scaler: bool = True
) -> Record:
    """Activations are as large as the probe's scaler saw them; if not, where they would be.

    :param source: the probe's file, for the command that corrects it.
    :param from_scaler: False where the probe has none and the size is that of other texts.
    """
    own = [reading for reading in readings if reading.is_probe]
    wrong = [r for r in own if not RATIO_LOW <= r.ratio <= RATIO_HIGH]
    reason = remedy = ""
    if wrong:
        first = wrong[0]
        fitting = _fitting(readings, first)
        reason = (
            f"activations at layer {first.layer}, site {first.site}, are {first.ratio:.3g} times "
            f"the size {'that the probe was fitted on' if from_scaler else 'on other texts'}"
        )
        if not from_scaler:
            remedy = COPIES
        elif fitting:
            best = fitting[0]
            reason += f"; layer {best.layer}, site {best.site}, would fit ({best.ratio:.3g})"
            remedy = _moved(source, first, best, layers=len(own))
        else:
            reason += "; no neighbouring layer or site would fit"
            remedy = _OWN_PROBE
    return Record(
        name=SIZE if from_scaler else f"{SIZE}, against other texts",
        outcome="failed" if wrong else "passed" if own else "unknown",
        expected=f"{RATIO_LOW:g} to {RATIO_HIGH:g}",
        measured=(wrong or own)[0].ratio if own else None,
        unit="times",
        reason=reason or ("" if own else "the probe's own layer was not read"),
        remedy=remedy,
    )


def _fitting(readings: Sequence[SizeReading], wrong: SizeReading) -> list[SizeReading]:
    """Other places where activations are as large as one layer's scaler says: first what differs
    in layer or site alone, then by how well it fits. After an RMSNorm every layer's are as large.
    """
    taken = {r.layer for r in readings if r.is_probe and r.layer != wrong.layer}
    places = [
        r
        for r in readings
        if r.own_layer == wrong.layer
        and not r.is_probe
        and r.layer not in taken
        and RATIO_LOW <= r.ratio <= RATIO_HIGH
    ]

    def rank(r: SizeReading) -> tuple[bool, float]:
        return r.layer != wrong.layer and r.site != wrong.site, abs(math.log(r.ratio))

    return sorted(places, key=rank)


def _moved(source: str, own: SizeReading, best: SizeReading, *, layers: int) -> str:
    """The command that makes a probe of ``best``'s place."""
    changes = ""
    if best.layer != own.layer:
        changes += f" --layer {best.layer if layers == 1 else f'{own.layer}={best.layer}'}"
    if best.site != own.site:
        changes += f" --site {best.site}"
    command = f"python -m pytest_multigpu.probes convert {shlex.quote(source)} {MOVED}{changes}"
    return f"if it was fitted there: {command}, and --gpu-probe={MOVED}"


def unmeasured_size(*, synthesised: bool) -> Record:
    """The size of activations can't tell anything: not of synthesised weights, and not of a probe
    that does not say how large they were where it was fitted."""
    if synthesised:
        reason = "needs the checkpoint; weights were synthesised"
        remedy = "--gpu-weights=checkpoint; --gpu-weights=synthetic leaves this check out"
    else:
        reason = "the probe has no scaler, so nothing tells whether its layer and site are right"
        remedy = "add mean and scale of the activations that it was fitted on to the probe's file"
    return Record(
        name=SIZE,
        outcome="unknown",
        expected=f"{RATIO_LOW:g} to {RATIO_HIGH:g}",
        unit="times",
        reason=reason,
        remedy=remedy,
    )
