"""Tables as lines of text: GPUs, a plan, peaks, matrices of pairs. Imports records and units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..records.check import Record
from ..records.report import CheckResult, RunReport
from ..units import gib
from .words import (
    columns,
    gib_cell,
    layers_text,
    matrix_cell,
    measured_peaks,
    pair_of,
    shown_device,
    value_text,
)

MATRIX_FROM = 7
"""Fewer pairs than this are lines; this many and more are a matrix under ``-v``."""


@dataclass(frozen=True)
class Line:
    """One line of text and the names of pytest's terminal markup for it."""

    text: str
    markup: tuple[str, ...] = ()

    @property
    def kwargs(self) -> dict[str, bool]:
        """For ``terminalreporter.write_line(line.text, **line.kwargs)``."""
        return dict.fromkeys(self.markup, True)


def table_lines(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()
) -> list[Line]:
    """Any table (what to rent, fleets): a bold head and aligned rows."""
    texts = columns([head, *rows], right=right)
    return [Line(texts[0], ("bold",)), *(Line(text) for text in texts[1:])]


@dataclass(frozen=True)
class GpuRow:
    """Cells of one row of :func:`gpu_table`; the last one is its unit or what is wrong."""

    cells: tuple[str, str, str, str, str, str, str, str, str]
    markup: tuple[str, ...] = ()

    @property
    def remark(self) -> str:
        """What is wrong, without the unit."""
        return self.cells[8].removeprefix("GiB").removeprefix(", ")


def gpu_table(report: RunReport) -> list[Line]:
    """A row for each device: layers and GiB of weights, KV cache, peaks and limit."""
    rows = gpu_rows(report)
    if not rows:
        return []
    head = ("GPU", "name", "layers", "weights", "KV", "predicted", "measured", "limit", "")
    texts = columns([head, *(row.cells for row in rows)], right=range(3, 8))
    return [
        Line(texts[0], ("bold",)),
        *(Line(text, row.markup) for text, row in zip(texts[1:], rows, strict=True)),
    ]


def gpu_rows(report: RunReport) -> list[GpuRow]:
    """Visible GPUs in CUDA order, then the plan's other devices, then hidden GPUs."""
    machine, plan = report.machine, report.plan
    planned = {device.device: device for device in plan.devices} if plan is not None else {}
    peaks = measured_peaks(report)
    gpus = machine.visible_gpus if machine is not None else ()
    names = {f"cuda:{i}": gpu for i, gpu in enumerate(gpus)}
    rows = []
    for device in dict.fromkeys([*names, *planned, *peaks]):
        gpu, plan_row = names.get(device), planned.get(device)
        limit = plan_row.limit_bytes if plan_row is not None else gpu.free_bytes if gpu else 0
        peak = plan_row.peak_bytes if plan_row is not None else None
        if gpu is None and peaks.get(device) is None and plan_row and not plan_row.weights_bytes:
            continue  # a cpu or disk row that holds nothing
        problem = gpu.problem if gpu is not None else None
        worst = max(peak or 0, peaks.get(device, 0))
        over = bool(limit) and worst > limit
        on_gpu = device.startswith("cuda:")
        rows.append(
            GpuRow(
                (
                    shown_device(device),
                    gpu.name if gpu is not None else "",
                    layers_text(plan_row.layers if plan_row is not None else None),
                    gib_cell(plan_row.weights_bytes if plan_row is not None else None),
                    gib_cell(plan_row.kv_bytes if plan_row is not None else None),
                    gib_cell(peak),
                    gib_cell(peaks.get(device)),
                    gib_cell(limit) if on_gpu else "-",
                    problem or (f"GiB, {gib(worst - limit)} over" if over else "GiB"),
                ),
                ("red",) if problem or over else () if on_gpu else ("yellow",),
            )
        )
    for gpu in machine.gpus if machine is not None else ():
        if gpu.cuda_index is None and gpu.index not in (machine.visible if machine else ()):
            why = gpu.problem or "hidden by CUDA_VISIBLE_DEVICES"
            cells = (f"NVML {gpu.index}", gpu.name, "-", "-", "-", "-", "-", "-", why)
            rows.append(GpuRow(cells, ("red",) if gpu.problem else ()))
    return rows


def block_list(names: Sequence[str]) -> str:
    """``model.layers.76 to 79 (4 blocks), lm_head``: runs of numbered blocks are shortened."""
    parts: list[tuple[str, int, int] | str] = []
    for name in names:
        stem, _, last = name.rpartition(".")
        if not (stem and last.isdigit()):
            parts.append(name)
            continue
        previous = parts[-1] if parts else None
        if isinstance(previous, tuple) and previous[0] == stem and previous[2] + 1 == int(last):
            parts[-1] = (stem, previous[1], int(last))
        else:
            parts.append((stem, int(last), int(last)))
    shown = []
    for part in parts:
        if isinstance(part, str):
            shown.append(part)
        elif part[1] == part[2]:
            shown.append(f"{part[0]}.{part[1]}")
        else:
            shown.append(f"{part[0]}.{part[1]} to {part[2]} ({part[2] - part[1] + 1} blocks)")
    return ", ".join(shown)


def phase_table(report: RunReport) -> list[Line]:
    """Measured peaks phase by phase: ``allocated / reserved / in use`` in GiB on each GPU."""
    phases = [*((report.load.peaks,) if report.load else ()), *report.peaks]
    phases = [phase for phase in phases if phase.readings]
    if not phases:
        return []
    planned = {d.device: d for d in report.plan.devices} if report.plan is not None else {}
    rows = [("peak of", "GPU", "allocated", "reserved", "in use", "predicted", "")]
    for phase in phases:
        for reading in phase.readings:
            device = planned.get(reading.device)
            # 0: the plan has no such phase on this device.
            predicted = getattr(device.peaks, f"{phase.phase}_bytes", 0) if device else 0
            rows.append(
                (
                    phase.phase,
                    shown_device(reading.device),
                    gib_cell(reading.allocated_bytes),
                    gib_cell(reading.reserved_bytes),
                    gib_cell(reading.used_bytes),
                    gib_cell(predicted or None),
                    "GiB",
                )
            )
    texts = columns(rows, right=range(2, 6))
    return [Line(texts[0], ("bold",)), *(Line(text) for text in texts[1:])]


@dataclass(frozen=True)
class Matrix:
    """Values of one name and unit between pairs: ``cells[from, to]``."""

    name: str
    unit: str
    devices: tuple[str, ...]
    cells: dict[tuple[str, str], Record]


def pair_matrices(checks: Sequence[CheckResult]) -> list[Matrix]:
    """Every set of records about pairs of devices, as a matrix."""
    found: dict[tuple[str, str], dict[tuple[str, str], Record]] = {}
    for check in checks:
        for record in check.records:
            pair = pair_of(record.device)
            if pair is not None:
                found.setdefault((record.name, record.unit), {})[pair] = record
    matrices = []
    for (name, unit), cells in found.items():
        ends = {end for pair in cells for end in pair}
        devices = tuple(sorted(ends, key=_device_order))
        matrices.append(Matrix(name, unit, devices, cells))
    return matrices


def _device_order(device: str) -> tuple[int, int, str]:
    last = device.rpartition(" ")[2]
    return (0, int(last), "") if last.isdigit() else (1, 0, device)


def copy_matrices(checks: Sequence[CheckResult]) -> list[Line]:
    """``from`` down, ``to`` across; only where the pairs carry numbers."""
    lines: list[Line] = []
    for matrix in pair_matrices(checks):
        numeric = [r.measured for r in matrix.cells.values() if isinstance(r.measured, int | float)]
        if len(matrix.cells) < MATRIX_FROM or not numeric:
            continue
        rows = [["from \\ to", *matrix.devices]]
        for source in matrix.devices:
            row = [source]
            for target in matrix.devices:
                record = matrix.cells.get((source, target))
                row.append(_cell(record))
            rows.append(row)
        unit = f" ({matrix.unit})" if matrix.unit else ""
        lines.append(Line(f"{matrix.name}{unit}, ! = not passed", ("bold",)))
        lines += [Line(text) for text in columns(rows, right=range(1, len(rows[0])))]
    return lines


def _cell(record: Record | None) -> str:
    if record is None:
        return "-"
    value = record.measured
    if isinstance(value, int | float) and not isinstance(value, bool):
        text = matrix_cell(value)
    else:
        text = value_text(value)
    return text if record.outcome == "passed" else f"{text} !"
