"""Why a GPU ran below its clocks, in words. Pure; imports records only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ..records.health import GpuHealth

Readings = Mapping[int, GpuHealth]
"""CUDA index to what NVML said of that GPU while something was measured."""

# Bits of nvmlClocksEventReasons (nvml.h).
HW_SLOWDOWN, SW_THERMAL, HW_THERMAL, HW_POWER_BRAKE = 0x8, 0x20, 0x40, 0x80
SET_CLOCKS, POWER_CAP = 0x2, 0x4
HARDWARE = {
    HW_THERMAL: "hardware thermal slowdown",
    HW_POWER_BRAKE: "hardware power brake",
    HW_SLOWDOWN: "hardware slowdown",
}
_REASONS = {
    **HARDWARE,
    SW_THERMAL: "slowed by the driver for heat",
    POWER_CAP: "at the power cap",
    SET_CLOCKS: "at clocks that somebody set",
}
"""The power cap is normal under load; beside siblings that are not at theirs it tells."""


def conditions(row: GpuHealth) -> str:
    """`` (990 of 1980 MHz, 91 C, 400 W)``; empty where nothing of it is known."""
    parts = _clocks_and_heat([row])
    return f" ({', '.join(parts)})" if parts else ""


def how_it_ran(gpu: int, siblings: Sequence[int], readings: Readings) -> str:
    """Clocks, heat and throttle reasons of a slow GPU beside its siblings', a part of a sentence.

    ``it ran at 990 of 1980 MHz, 91 C, 400 W, hardware thermal slowdown; its siblings at 1965 to
    1980 of 1980 MHz, 58 to 63 C, 640 to 655 W, not slowed``
    """
    return _beside("it ran", gpu, siblings, readings, _ran)


def how_it_is_linked(gpu: int, siblings: Sequence[int], readings: Readings) -> str:
    """``its PCIe link ran at x4 of x16, generation 4 of 4; its siblings at x16 of x16, ...``."""
    return _beside("its PCIe link ran", gpu, siblings, readings, _links)


def _beside(
    what: str,
    gpu: int,
    siblings: Sequence[int],
    readings: Readings,
    describe: Callable[[Sequence[GpuHealth]], str],
) -> str:
    own = [row for one in (gpu,) if (row := readings.get(one)) and row.problem is None]
    others = [row for one in siblings if (row := readings.get(one)) and row.problem is None]
    text = f"{what} at {describe(own)}" if own else "NVML did not say how it ran meanwhile"
    return f"{text}; its siblings at {describe(others)}" if others else text


def _ran(rows: Sequence[GpuHealth]) -> str:
    masks = [row.throttle for row in rows if row.throttle is not None]
    reasons = [what for bit, what in _REASONS.items() if any(mask & bit for mask in masks)]
    slowed = reasons or (["not slowed"] if masks else ["throttle reasons unknown"])
    return ", ".join([*(_clocks_and_heat(rows) or ["unknown clocks"]), *slowed])


def _clocks_and_heat(rows: Sequence[GpuHealth]) -> list[str]:
    most = _range([row.sm_max_mhz for row in rows])
    found = (
        (_range([row.sm_mhz for row in rows]), f" of {most} MHz" if most else " MHz"),
        (_range([row.temperature_c for row in rows]), " C"),
        (_range([None if row.power_w is None else round(row.power_w) for row in rows]), " W"),
    )
    return [f"{values}{unit}" for values, unit in found if values]


def _links(rows: Sequence[GpuHealth]) -> str:
    width, generation = ([row.pcie_width for row in rows], [row.pcie_generation for row in rows])
    most = [row.pcie_width_max for row in rows], [row.pcie_generation_max for row in rows]
    parts = [
        f"{begin}{_range(values) or '?'} of {begin.removeprefix('generation ')}{_range(top) or '?'}"
        for begin, values, top in (("x", width, most[0]), ("generation ", generation, most[1]))
    ]
    return ", ".join(parts)


def _range(values: Sequence[int | None]) -> str:
    known = sorted(value for value in values if value is not None)
    if not known:
        return ""
    return str(known[0]) if known[0] == known[-1] else f"{known[0]} to {known[-1]}"
