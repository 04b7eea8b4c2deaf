"""``report.json`` (schema 1): the run as plain data. :mod:`.folder` writes it. Imports records."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ..records.check import Record
from ..records.machine import Machine
from ..records.model import LoadReport, PhasePeaks, Placement
from ..records.plan import Plan
from ..records.report import CheckResult, RunReport, VramSample
from .drift import scores_row

SCHEMA = 1


def to_json(report: RunReport) -> dict[str, Any]:
    """The report as plain data; ``None`` where nothing is known yet. Every size is in bytes.

    Not-a-number and infinity become null, with the text under ``<key>_text``: they are not JSON.
    """
    verdict = report.verdict
    data: dict[str, Any] = {
        "schema": SCHEMA,
        "verdict": None if verdict is None else verdict.word,
        "line": None if verdict is None else verdict.line,
        "exit_code": None if verdict is None else verdict.exit_code,
        "reasons": [] if verdict is None else list(verdict.reasons),
        "running": report.running,
        "tier_asked": report.tier_asked,
        "tier": report.tier,
        "started": report.started,
        "wall_seconds": report.wall_seconds,
        "machine": _machine(report.machine),
        "plan": _plan(report.plan),
        "load": _load(report.load),
        "placement": _placement(report.placement),
        "checks": [row for check in report.checks for row in _check(check)],
        "peaks": [_phase(phase) for phase in report.peaks],
        "scores": None if report.scores is None else scores_row(report.scores),
        "vram": _vram(report.vram),
        "spans": [{"nodeid": s.nodeid, "start": s.start, "end": s.end} for s in report.spans],
        "versions": dict(report.versions),
    }
    if report.pods:
        data["pods"] = [
            {"name": pod.name, "host": pod.host, **to_json(pod.report)} for pod in report.pods
        ]
    finite: dict[str, Any] = _finite(data)
    return finite


def _machine(machine: Machine | None) -> dict[str, Any] | None:
    if machine is None:
        return None
    return {
        "driver": machine.driver,
        "cuda": machine.cuda,
        "visible": list(machine.visible),
        "visible_env": machine.visible_env,
        "expandable_segments": machine.expandable_segments,
        "simulated": machine.simulated,
        "problem": machine.problem,
        "gpus": [
            {
                "index": gpu.index,
                "cuda_index": gpu.cuda_index,
                "uuid": gpu.uuid,
                "name": gpu.name,
                "total_bytes": gpu.total_bytes,
                "free_bytes": gpu.free_bytes,
                "used_bytes": gpu.used_bytes,
                "reserved_bytes": gpu.reserved_bytes,
                "capability": None if gpu.capability is None else list(gpu.capability),
                "nvlinks": gpu.nvlinks,
                "problem": gpu.problem,
            }
            for gpu in machine.gpus
        ],
    }


def _plan(plan: Plan | None) -> dict[str, Any] | None:
    if plan is None:
        return None
    return {
        "model": plan.architecture.model,
        "model_class": plan.architecture.model_class,
        "parameters": plan.architecture.parameters,
        "weights": plan.weights,
        "tier": plan.architecture.tier,
        "dtype": plan.architecture.dtype,
        "placement": plan.placement,
        "fits": plan.fits,
        "reasons": list(plan.reasons),
        "remedies": list(plan.remedies),
        "warnings": list(plan.warnings),
        "unknown": list(plan.architecture.unknown),
        "attention": plan.architecture.attention,
        "context_tokens": plan.context_tokens,
        "batch": plan.batch,
        "weights_bytes": plan.weights_bytes,
        "devices": [
            {
                "device": device.device,
                "layers": None if device.layers is None else list(device.layers),
                "weights_bytes": device.weights_bytes,
                "kv_bytes": device.kv_bytes,
                "activation_bytes": device.activation_bytes,
                "reserve_bytes": device.reserve_bytes,
                "peak_bytes": device.peak_bytes,
                "limit_bytes": device.limit_bytes,
                "peaks": {
                    "load_bytes": device.peaks.load_bytes,
                    "prefill_bytes": device.peaks.prefill_bytes,
                    "decode_bytes": device.peaks.decode_bytes,
                    "probe_bytes": device.peaks.probe_bytes,
                },
                "parts": {phase: asdict(parts) for phase, parts in device.parts.items()},
            }
            for device in plan.devices
        ],
        "offloaded": list(plan.offloaded),
        "device_map": dict(plan.device_map),
        "max_memory": None if plan.max_memory is None else dict(plan.max_memory),
        "longest": [asdict(one) for one in plan.longest],
    }


def _load(load: LoadReport | None) -> dict[str, Any] | None:
    if load is None:
        return None
    return {
        "seconds": load.seconds,
        "bytes": load.bytes,
        "weights": load.weights,
        "loader": load.loader,
        "notes": list(load.notes),
        "peaks": _phase(load.peaks),
    }


def _placement(placement: Placement | None) -> dict[str, Any] | None:
    if placement is None:
        return None
    return {
        "devices": [
            {
                "device": device.device,
                "parameters": device.parameters,
                "weights_bytes": device.weights_bytes,
                "layers": list(device.layers),
            }
            for device in placement.devices
        ],
        "device_map": dict(placement.device_map),
    }


def _phase(phase: PhasePeaks) -> dict[str, Any]:
    return {
        "phase": phase.phase,
        "devices": [
            {
                "device": reading.device,
                "allocated_bytes": reading.allocated_bytes,
                "reserved_bytes": reading.reserved_bytes,
                "used_bytes": reading.used_bytes,
            }
            for reading in phase.readings
        ],
    }


def _vram(samples: Sequence[VramSample]) -> dict[str, dict[str, list[Any]]]:
    """Device to its samples as two columns: there may be thousands."""
    columns: dict[str, dict[str, list[Any]]] = {}
    for sample in samples:
        device = columns.setdefault(sample.device, {"seconds": [], "used_bytes": []})
        device["seconds"].append(sample.seconds)
        device["used_bytes"].append(sample.used_bytes)
    return columns


def _check(check: CheckResult) -> list[dict[str, Any]]:
    """A row for each record; and one for the test itself where the records don't tell its end."""
    skipped = check.outcome == "skipped"
    rows = [] if skipped else [_row(check, record) for record in check.records]
    told = bool(rows) and not check.reason and (check.outcome == "passed" or check.failed_records)
    if not told:
        name = check.nodeid.rpartition("::")[2] or check.nodeid
        rows.append(
            {
                "nodeid": check.nodeid,
                "outcome": check.outcome,
                "name": name,
                "expected": None,
                "measured": None,
                "unit": "",
                "device": "",
                "reason": check.reason,
                "remedy": "",
                "shortfall": check.shortfall,
                "seconds": check.seconds,
            }
        )
    return rows


def _row(check: CheckResult, record: Record) -> dict[str, Any]:
    return {
        "nodeid": check.nodeid,
        "outcome": record.outcome,
        "name": record.name,
        "expected": record.expected,
        "measured": record.measured,
        "unit": record.unit,
        "device": record.device,
        "reason": record.reason,
        "remedy": record.remedy,
        "shortfall": record.shortfall,
        "seconds": check.seconds,
    }


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        out: dict[str, Any] = {}
        for key, item in value.items():
            out[str(key)] = _finite(item)
            if isinstance(item, float) and not math.isfinite(item):
                out[f"{key}_text"] = str(item)
        return out
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
