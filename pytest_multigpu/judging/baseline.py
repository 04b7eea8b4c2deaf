"""Compare a run with the recorded one. Pure: records only.

The tolerances are read by :mod:`.baseline_rule`, the file's content by :mod:`.baseline_file`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import groupby
from statistics import fmean, pstdev

from ..records.baseline import KINDS, UNITS, Baseline, BaselineKey, Kind, Measurement, Tolerance
from ..records.check import Record
from ..records.drift import LARGEST, TextScores
from ..records.report import CheckResult, RunReport


def key_of(report: RunReport) -> BaselineKey | None:
    """What this run may be compared with; None if it knows no plan or no versions."""
    plan, machine = report.plan, report.machine
    torch, transformers = (_minor(report.versions.get(n)) for n in ("torch", "transformers"))
    if plan is None or torch is None or transformers is None:
        return None
    gpus = () if machine is None or report.tier == "cpu" else machine.visible_gpus
    # In CUDA's order, since peaks are kept by number.
    hardware = " + ".join(
        f"{len(list(alike))} x {name}" for name, alike in groupby(gpu.name for gpu in gpus)
    )
    if hardware and machine is not None and machine.expandable_segments:
        hardware += " with expandable segments"  # whose peaks are lower
    return BaselineKey(
        hardware=hardware or "cpu",
        model=plan.architecture.model,
        tier=plan.architecture.tier,
        dtype=plan.architecture.dtype,
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
