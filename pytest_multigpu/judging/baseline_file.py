"""What a baseline file holds, checked to the last value, and back. Pure: records and errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import UsageError, shown
from ..records.baseline import KINDS, UNITS, Baseline, Measurement

SCHEMA = 1


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
