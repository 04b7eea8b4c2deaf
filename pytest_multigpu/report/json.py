"""``report.json`` (schema 1): the run as plain data, rewritten whole as the run goes.

Every write goes to a temporary file beside it, is synced and renamed: whoever is killed, and
whenever, the file is the last complete one. Imports records and errors.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..records.check import Record
from ..records.machine import Machine
from ..records.model import LoadReport, PhasePeaks, Placement
from ..records.plan import Plan
from ..records.report import CheckResult, RunReport, VramSample

SCHEMA = 1
REPORT_FILE, DEVICE_MAP_FILE, HTML_FILE = "report.json", "device_map.json", "report.html"


def to_json(report: RunReport) -> dict[str, Any]:
    """The report as plain data; ``None`` where nothing is known yet. Every size is in bytes.

    Not-a-number and infinity become null, with the text under ``<key>_text``: they are not JSON.
    """
    verdict = report.verdict
    data: dict[str, Any] = {
        "schema": SCHEMA,
        "verdict": None if verdict is None else "READY" if verdict.ready else "NOT READY",
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
        "unknown": list(plan.architecture.unknown),
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
            }
            for device in plan.devices
        ],
        "offloaded": list(plan.offloaded),
        "device_map": dict(plan.device_map),
        "max_memory": None if plan.max_memory is None else dict(plan.max_memory),
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


def write_atomic(path: Path, content: str) -> None:
    """Replace ``path`` with ``content`` (UTF-8) as a whole or not at all.

    :raises OSError: the folder cannot be written; ``path`` is then as it was.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes 0600; a report is for everyone whom the umask lets read.
        umask = os.umask(0)
        os.umask(umask)
        Path(name).chmod(0o666 & ~umask)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: Path, data: Any) -> None:
    """``data`` as JSON, whole or not at all. ``ValueError`` on NaN: it would not be JSON.

    A line for each key, and for each row of a list: as quick as without any indentation, which
    counts in a file that is rewritten at every test, and still fit to read and to compare.
    """
    if isinstance(data, dict) and data:
        lines = [f"{json.dumps(key)}: {_compact(value)}" for key, value in data.items()]
        write_atomic(path, "{\n" + ",\n".join(lines) + "\n}\n")
    else:
        write_atomic(path, json.dumps(data, allow_nan=False) + "\n")


def _compact(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        rows = ",\n ".join(json.dumps(row, allow_nan=False) for row in value)
        return f"[\n {rows}\n]"
    return json.dumps(value, allow_nan=False)


class ReportFile:
    """``report.json`` and ``device_map.json`` in one folder, up to date with the run.

    :raises UsageError: the folder cannot be made or written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name in (REPORT_FILE, DEVICE_MAP_FILE, HTML_FILE):
                # What an earlier run left must not pass for this one's.
                (folder / name).unlink(missing_ok=True)
            for left in folder.glob(".*.tmp"):
                if left.name.startswith((f".{REPORT_FILE}.", f".{DEVICE_MAP_FILE}.")):
                    left.unlink(missing_ok=True)
        except OSError as error:
            raise UsageError(
                f"--gpu-report: cannot write to {folder} ({error.strerror}); name a folder "
                "that can be written"
            ) from error
        self._map: dict[str, int | str] | None = None

    def update(self, report: RunReport) -> None:
        """Rewrite ``report.json``; and ``device_map.json`` when the map is known or changed."""
        write_json(self.folder / REPORT_FILE, to_json(report))
        found = report.placement.device_map if report.placement is not None else {}
        device_map = dict(found or (report.plan.device_map if report.plan is not None else {}))
        if device_map and device_map != self._map:
            write_json(self.folder / DEVICE_MAP_FILE, device_map)
            self._map = device_map


def read_report(path: Path) -> dict[str, Any]:
    """A ``report.json`` as :func:`to_json` made it.

    :raises UsageError: missing, damaged, or of another schema.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: is not JSON ({error})") from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise UsageError(f"{path}: is not a report of schema {SCHEMA}")
    return data
