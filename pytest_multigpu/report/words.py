"""How people see values: ``GPU 0`` for ``cuda:0``, GiB for bytes, aligned columns.

Imports units and records.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from ..records.check import Record, Value
from ..records.model import LoadReport, PhasePeaks
from ..records.report import RunReport, Verdict
from ..units import GIB, human_size

_CUDA = re.compile(r"\bcuda:(\d+)")
_PAIR = re.compile(r"(\S.*?) -> (\S.*)")
_NUMBER_AT_END = re.compile(r"(?:(.*\D)\s)?(\d+(?:\.\d+)?)")


def shown_device(device: str) -> str:
    """``cuda:0 -> cuda:1`` as ``GPU 0 -> GPU 1``; everything else as it is."""
    return _CUDA.sub(r"GPU \1", device)


def verdict_colour(verdict: Verdict | None) -> tuple[str, ...]:
    """Red only where the exit code is that of a failure; none where nothing was checked."""
    if verdict is None:
        return ("red",)
    if not verdict.checked:
        return ()
    return ("green" if verdict.ready else "red" if verdict.exit_code else "yellow",)


def pair_of(device: str) -> tuple[str, str] | None:
    """``cuda:0 -> cuda:1`` as ``("GPU 0", "GPU 1")``; None for one device or a chain."""
    match = _PAIR.fullmatch(shown_device(device))
    if match is None or " -> " in match.group(2):
        return None
    return match.group(1), match.group(2)


def number(value: float) -> str:
    """``1234567``, ``148.2``, ``0.52``, ``1.3e-06``: one digit after the point from 10 up."""
    if isinstance(value, int):
        return str(value)
    if abs(value) >= 10:
        return f"{value:.1f}"
    if abs(value) >= 0.01:
        return f"{value:.2f}"
    return f"{value:.2g}"


def value_text(value: Value, unit: str = "") -> str:
    """``78.7 GiB``, ``148.2 GB/s``, ``yes``; ``-`` for nothing. Words stay, with their unit.

    ``at least 42949672960`` in ``bytes`` is ``at least 40.0 GiB``.
    """
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        match = _NUMBER_AT_END.fullmatch(value)
        if match is None or not unit:
            return value
        words, digits = match.groups()
        shown = human_size(int(float(digits))) if unit == "bytes" else f"{digits} {unit}"
        return f"{words} {shown}" if words else shown
    if unit == "bytes" and value == value and abs(value) != float("inf"):  # noqa: PLR0124
        return human_size(int(value))
    if value == 1 and unit.isalpha() and unit.endswith("s") and unit != "s":
        unit = unit[:-1]
    return f"{number(value)} {unit}".rstrip()


def expected_text(record: Record) -> str:
    return value_text(record.expected, record.unit)


def measured_text(record: Record) -> str:
    return value_text(record.measured, record.unit)


def matrix_cell(value: float) -> str:
    """``151``, ``7.5``: short enough for a cell of a matrix."""
    return f"{value:.0f}" if abs(value) >= 10 or value == 0 else f"{value:.2g}"


def printable(text: str) -> str:
    """Control characters are no HTML and surrogates no UTF-8: both become U+FFFD."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def gib_cell(size_bytes: int | None) -> str:
    """A number of GiB for a table whose head says so; ``-`` for unknown."""
    return "-" if size_bytes is None else f"{size_bytes / GIB:.1f}"


def layers_text(layers: tuple[int, int] | None) -> str:
    if layers is None:
        return "-"
    first, last = layers
    return str(first) if first == last else f"{first}-{last}"


def columns(rows: Sequence[Sequence[str]], *, right: Iterable[int] = ()) -> list[str]:
    """Rows as aligned text, two spaces between columns; ``right`` are the right-aligned ones."""
    if not rows:
        return []
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    to_right = set(right)
    return [
        "  ".join(
            cell.rjust(width) if i in to_right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def measured_peaks(report: RunReport) -> dict[str, int]:
    """Device to the highest bytes seen on it: NVML's ``used``, else what torch reserved."""
    loads: tuple[LoadReport, ...] = () if report.load is None else (report.load,)
    phases: list[PhasePeaks] = [*report.peaks, *(load.peaks for load in loads)]
    peaks: dict[str, int] = {}
    for phase in phases:
        for reading in phase.readings:
            seen = reading.reserved_bytes if reading.used_bytes is None else reading.used_bytes
            peaks[reading.device] = max(seen, peaks.get(reading.device, 0))
    return peaks
