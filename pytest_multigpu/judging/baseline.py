"""Compare a run with the recorded one. Pure: records, units and errors only."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from statistics import fmean, pstdev
from typing import Any

from ..errors import UsageError, shown
from ..records.baseline import (
    DEFAULT_RULE,
    KINDS,
    UNITS,
    Baseline,
    BaselineKey,
    Kind,
    Measurement,
    Tolerance,
)
from ..records.check import Record
from ..records.drift import LARGEST, TextScores
from ..records.report import CheckResult, RunReport
from ..units import parse_size

SCHEMA = 1
_NUMBER = re.compile(r"\d{1,9}(?:\.\d{1,9})?", re.ASCII)
_OPTION = "--gpu-baseline-rule"


def parse_rule(text: str | None) -> dict[Kind, Tolerance]:
    """``peak:2%+256MiB speed:10% load:20%`` as tolerances; a kind left out is not compared.

    A percentage is of the recorded value; after ``+``, or alone, an amount: a size for ``peak``,
    seconds (``5s``) for ``load``, a number for ``speed`` (tokens/s) and ``score`` (standard
    deviations of the text set's scores, since a probe's unit is its own).

    :param text: None is :data:`DEFAULT_RULE`.
    :raises UsageError: naming the part that cannot be read.
    """
    rule: dict[Kind, Tolerance] = {}
    terms = (DEFAULT_RULE if text is None else text).split()
    if not terms:
        raise UsageError(f"{_OPTION}: is empty; write it like peak:2%+256MiB speed:10%")
    for term in terms:
        name, colon, amounts = term.partition(":")
        kind = next((known for known in KINDS if known == name), None)
        if kind is None:
            raise UsageError(f"{_OPTION}: {term!r} is of no known kind; known: {', '.join(KINDS)}")
        if not colon or not amounts:
            raise UsageError(f"{_OPTION}: {term!r} has no tolerance; write it like {kind}:10%")
        if kind in rule:
            raise UsageError(f"{_OPTION}: {kind} is named twice; name it once")
        rule[kind] = _tolerance(kind, amounts, term)
    return rule


def _tolerance(kind: Kind, amounts: str, term: str) -> Tolerance:
    fraction: float | None = None
    absolute: float | None = None
    for part in amounts.split("+"):
        percent = part.endswith("%")
        if (fraction if percent else absolute) is not None:
            what = "percentages" if percent else "amounts"
            raise UsageError(f"{_OPTION}: {term!r} has two {what}; write one")
        if percent:
            if _NUMBER.fullmatch(part[:-1]) is None:
                raise UsageError(f"{_OPTION}: {term!r}: {part!r} is not a percentage like 10%")
            fraction = float(part[:-1]) / 100
        else:
            absolute = _amount(kind, part, term)
    if kind == "speed" and (fraction or 0) >= 1:
        raise UsageError(f"{_OPTION}: {term!r} could never fail; write less than 100%")
    return Tolerance(fraction or 0.0, absolute or 0.0)


def _amount(kind: Kind, part: str, term: str) -> float:
    if kind == "peak":
        return parse_size(part, what=f"{_OPTION}: {term}")
    digits = part.removesuffix("s") if kind == "load" else part
    if _NUMBER.fullmatch(digits) is None or (kind == "load" and digits == part):
        example = {"load": "seconds like 5s", "speed": "tokens/s like 2"}.get(kind, "a number")
        raise UsageError(f"{_OPTION}: {term!r}: {part!r} is not a percentage or {example}")
    return float(digits)


def key_of(report: RunReport) -> BaselineKey | None:
    """What this run may be compared with; None if it knows no plan or no versions."""
    plan, machine = report.plan, report.machine
    torch, transformers = (_minor(report.versions.get(n)) for n in ("torch", "transformers"))
    if plan is None or torch is None or transformers is None:
        return None
    gpus = () if machine is None or report.tier == "cpu" else machine.visible_gpus
    return BaselineKey(
        hardware=" + ".join(dict.fromkeys(gpu.name for gpu in gpus)) or "cpu",
        gpus=len(gpus),
        model=plan.architecture.model,
        tier=plan.architecture.tier,
        placement=plan.placement,
        weights=plan.weights,
        context_tokens=plan.context_tokens,
        batch=plan.batch,
        torch=torch,
        transformers=transformers,
    )


def _minor(version: str | None) -> str | None:
    return None if version is None else ".".join(version.split(".")[:2])


def measurements(report: RunReport) -> dict[str, Measurement]:
    """What a finished run measured: peaks a phase and GPU, load time, speeds and scores.

    Speeds are records in ``tokens/s``; an unknown one is none.
    """
    found = [
        Measurement(
            name=f"{phase.phase} peak",
            kind="peak",
            value=reading.reserved_bytes if reading.used_bytes is None else reading.used_bytes,
            device=reading.device,
        )
        for phase in report.peaks
        for reading in phase.readings
    ]
    if report.load is not None:
        found.append(Measurement(name="load time", kind="load", value=report.load.seconds))
    for check in report.checks:
        for record in check.records:
            value = record.measured
            if record.unit != "tokens/s" or record.outcome == "unknown" or isinstance(value, bool):
                continue
            if isinstance(value, int | float):
                found.append(
                    Measurement(
                        name=record.name, kind="speed", value=float(value), device=record.device
                    )
                )
    found += [] if report.scores is None else _scores(report.scores)
    return {one.key: one for one in found}


def _scores(scores: TextScores) -> list[Measurement]:
    """Mean and deviation over the text set: a shift of all scores, and a stretch."""
    usable = all(abs(value) < LARGEST for value in scores.values) and scores.differ
    if not usable:
        return []
    spread = pstdev(scores.values)
    of = f"{scores.texts}, probe {scores.probe[:8]}"
    return [
        Measurement(name=f"{what} of {of}", kind="score", value=value, spread=spread)
        for what, value in (("mean score", fmean(scores.values)), ("score deviation", spread))
    ]


def compare(
    baseline: Baseline | None,
    measured: Mapping[str, Measurement],
    rule: Mapping[Kind, Tolerance],
    *,
    key: str,
    file: str,
) -> tuple[Record, ...]:
    """A record for each number: passed within the tolerance, failed beyond it.

    Without a recorded or a measured number the record is ``unknown``. A peak and a load time
    may be lower, a speed higher, without limit; a score may move neither way.
    """
    update = "record it with --gpu-baseline-update"
    if baseline is None:
        return (_unknown("baseline", f"{file} has no baseline for {key}", update),)
    records: list[Record] = []
    for kind in KINDS:
        tolerance = rule.get(kind)
        if tolerance is None:
            continue
        old = {name: one for name, one in baseline.values.items() if one.kind == kind}
        new = {name: one for name, one in measured.items() if one.kind == kind}
        if old and not new:
            again = "run the checks that measure it"
            records.append(_unknown(f"{kind} baseline", f"this run measured no {kind}", again))
            continue
        for name in dict.fromkeys([*old, *new]):
            before, now = old.get(name), new.get(name)
            if before is None:
                text = f"{file} has no {name} for {key}"
                records.append(_unknown(f"{name} baseline", text, update))
            elif now is None or not math.isfinite(now.value):
                text = f"{name} was not measured"
                records.append(_unknown(f"{name} baseline", text, "run the check that measures it"))
            else:
                records.append(_judge(before, now, tolerance))
    if not records:
        return (_unknown("baseline", "the rule compares nothing that was measured", update),)
    return tuple(records)


def check_run(
    report: RunReport,
    baselines: Mapping[str, Baseline],
    rule: Mapping[Kind, Tolerance],
    *,
    file: str,
) -> CheckResult:
    """The whole comparison as one more entry of the report; add it before the verdict.

    It measures nothing itself, so it is no executed check: ``is_check`` is False.
    """
    key = key_of(report)
    if key is None:
        reason = "this run has no plan to compare by"
        records: tuple[Record, ...] = (
            _unknown("baseline", reason, "run the checks that need the model"),
        )
    else:
        found = baselines.get(key.text)
        records = compare(found, measurements(report), rule, key=key.text, file=file)
    failed = any(record.outcome == "failed" for record in records)
    return CheckResult(
        nodeid=f"baseline {file}",
        outcome="failed" if failed else "passed",
        records=records,
        is_check=False,
    )


def _unknown(name: str, reason: str, remedy: str) -> Record:
    return Record(name=name, outcome="unknown", reason=reason, remedy=remedy)


def _judge(before: Measurement, now: Measurement, tolerance: Tolerance) -> Record:
    slack = abs(before.value) * tolerance.fraction + tolerance.absolute * before.spread
    change = now.value - before.value
    worse = {"speed": -change, "score": abs(change)}.get(before.kind, change)
    # A rounding error of the sum is not a regression.
    failed = worse > slack and not math.isclose(worse, slack, rel_tol=1e-9)
    words = {"speed": "at least", "score": "within"}.get(before.kind, "at most")
    bound = before.value + (-slack if before.kind == "speed" else slack)
    if before.kind == "score":
        expected = f"{before.value:.6g} within {slack:.6g}"
    else:
        limit = int(bound) if before.kind == "peak" else float(f"{bound:.6g}")
        expected = f"{words} {limit}"
    percent = f"{abs(change) / abs(before.value):.1%}" if before.value else f"{abs(change):.6g}"
    direction = "higher" if change > 0 else "lower"
    on = f" on {_shown(now.device)}" if now.device else ""
    return Record(
        name=f"{now.name} against the baseline",
        outcome="failed" if failed else "passed",
        expected=expected,
        measured=int(now.value) if now.kind == "peak" else now.value,
        unit=UNITS[now.kind],
        device=now.device,
        reason=f"{now.name}{on} is {percent} {direction} than the baseline" if failed else "",
        remedy="find the cause, or accept it with --gpu-baseline-update" if failed else "",
    )


def _shown(device: str) -> str:
    return device.replace("cuda:", "GPU ")


def merged(old: Baseline | None, key: str, new: Iterable[Measurement]) -> Baseline:
    """The new numbers; old ones stay for kinds that this run did not measure at all."""
    values = {one.key: one for one in new if math.isfinite(one.value)}
    kinds = {one.kind for one in values.values()}
    kept = {name: one for name, one in (old.values if old else {}).items() if one.kind not in kinds}
    return Baseline(key=key, values={**kept, **values})


def parse_baselines(data: Any, file: str) -> dict[str, Baseline]:
    """What a baseline file holds, checked to the last value.

    :raises UsageError: naming the file, the key and the remedy.
    """
    remedy = "repair or delete the file, then run with --gpu-baseline-update"
    if not isinstance(data, dict) or not isinstance(data.get("baselines"), dict):
        raise UsageError(f"{file}: is not a baseline file; {remedy}")
    if data.get("schema") != SCHEMA or isinstance(data["schema"], bool):
        found_schema = _short(data.get("schema"))
        raise UsageError(f"{file}: schema is {found_schema}, known is {SCHEMA}; {remedy}")
    found = {}
    for key, values in data["baselines"].items():
        if not isinstance(values, dict):
            raise UsageError(f"{file}: {_short(key)} is not an object; {remedy}")
        rows = [
            _measurement(row, f"{file}: {_short(key)}: {_short(name)}", remedy)
            for name, row in values.items()
        ]
        found[key] = Baseline(key=key, values={row.key: row for row in rows})
    return found


def _measurement(row: Any, where: str, remedy: str) -> Measurement:
    if not isinstance(row, dict):
        raise UsageError(f"{where} is not an object; {remedy}")
    name, device, value = row.get("name"), row.get("device", ""), row.get("value")
    kind = next((known for known in KINDS if known == row.get("kind")), None)
    if not isinstance(name, str) or not isinstance(device, str):
        raise UsageError(f"{where}: name and device must be text; {remedy}")
    if kind is None:
        raise UsageError(
            f"{where}: kind is {_short(row.get('kind'))}; known: {', '.join(KINDS)}; {remedy}"
        )
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        raise UsageError(f"{where}: value is {_short(value)}, not a number; {remedy}")
    spread = row.get("spread", 1.0)
    if isinstance(spread, bool) or not isinstance(spread, int | float) or not 0 < spread < 1e300:
        raise UsageError(f"{where}: spread is {_short(spread)}, not above zero; {remedy}")
    spread = float(spread) if kind == "score" else 1.0
    return Measurement(name=name, kind=kind, value=float(value), device=device, spread=spread)


def _short(value: Any) -> str:
    """A repr that stays on the line."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**20:
        return "a huge number"
    return shown(value)


def dump_baselines(baselines: Mapping[str, Baseline]) -> dict[str, Any]:
    """The inverse of :func:`parse_baselines`."""
    return {
        "schema": SCHEMA,
        "baselines": {
            key: {
                name: {
                    "name": one.name,
                    "kind": one.kind,
                    "value": int(one.value) if one.kind == "peak" else one.value,
                    "unit": UNITS[one.kind],
                    "device": one.device,
                    **({"spread": one.spread} if one.kind == "score" else {}),
                }
                for name, one in sorted(baseline.values.items())
            }
            for key, baseline in sorted(baselines.items())
        },
    }
