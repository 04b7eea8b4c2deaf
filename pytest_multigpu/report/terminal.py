"""The end of a run on the terminal, as lines of data; the plugin prints them.

::

    GPU    name                   layers  weights   KV  predicted  measured  limit
    GPU 0  NVIDIA H100 80GB HBM3  0-18       33.1  0.2       35.6      35.1   78.7   GiB

    passed   free VRAM            4 GPUs          at least 35.6 GiB    78.7 GiB
    FAILED   copies between GPUs  GPU 0 -> GPU 2  equal                4096 bytes differ
             the bytes that arrived on GPU 2 are all zero; run: ...

    NOT READY: the bytes that arrived on GPU 2 are all zero; run: ... (+1 more)

Imports records and units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..records.check import Record
from ..records.plan import Plan
from ..records.report import CheckResult, RunReport
from ..records.rent import RentRow
from ..units import GIB, gib
from .words import (
    columns,
    expected_text,
    gib_cell,
    layers_text,
    matrix_cell,
    measured_peaks,
    measured_text,
    number,
    pair_of,
    shown_device,
    value_text,
)


@dataclass(frozen=True)
class Line:
    """One line of text and the names of pytest's terminal markup for it."""

    text: str
    markup: tuple[str, ...] = ()

    @property
    def kwargs(self) -> dict[str, bool]:
        """For ``terminalreporter.write_line(line.text, **line.kwargs)``."""
        return dict.fromkeys(self.markup, True)


_COLOURS = {
    "passed": ("green",),
    "warned": ("yellow",),
    "unknown": ("yellow",),
    "skipped": ("yellow",),
    "failed": ("red",),
    "error": ("red",),
}
_SHOWN = {"failed": "FAILED", "error": "ERROR"}
_HIDDEN_MATRIX = 6
"""Up to this many pairs are lines; more are a matrix under ``-v``."""


def summary_lines(report: RunReport, *, verbosity: int = 0) -> list[Line]:
    """Everything after pytest's own summary. ``-q`` leaves the verdict, ``-v`` adds the tables."""
    verdict = verdict_lines(report)
    if verbosity < 0:
        return verdict
    blocks = [gpu_table(report), notes(report), check_lines(report.checks, verbose=verbosity > 0)]
    if verbosity > 0:
        blocks += [phase_table(report), copy_matrices(report.checks)]
    lines: list[Line] = []
    for block in blocks:
        if block:
            lines += [*block, Line("")]
    return [*lines, *verdict]


def verdict_lines(report: RunReport) -> list[Line]:
    verdict = report.verdict
    if verdict is None:
        return []
    return [Line(verdict.line, ("green" if verdict.ready else "red", "bold"))]


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


@dataclass(frozen=True)
class GpuRow:
    """Cells of one row of :func:`gpu_table`; the last one is its unit or what is wrong."""

    cells: tuple[str, str, str, str, str, str, str, str, str]
    markup: tuple[str, ...] = ()

    @property
    def remark(self) -> str:
        """What is wrong, without the unit."""
        return self.cells[8].removeprefix("GiB").removeprefix(", ")


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


def notes(report: RunReport) -> list[Line]:
    """Which weights, from where, how long; what is on the CPU; what broke in detection."""
    lines = []
    machine, plan, load = report.machine, report.plan, report.load
    if machine is not None and machine.problem:
        lines.append(Line(machine.problem, ("red",)))
    if plan is not None:
        lines.append(
            Line(
                f"model {plan.architecture.model}, {plan.architecture.tier} "
                f"({plan.architecture.dtype}), {gib(plan.weights_bytes)} of weights "
                f"({plan.weights}), placement {plan.placement}, context {plan.context_tokens} "
                f"tokens x {plan.batch}"
            )
        )
        if plan.offloaded:
            lines.append(Line(f"off the GPUs: {block_list(plan.offloaded)}", ("red",)))
    if load is not None:
        rate = f", {load.bytes / load.seconds / 1e9:.1f} GB/s" if load.seconds > 0 else ""
        lines.append(
            Line(
                f"loaded {gib(load.bytes)} ({load.weights}) in {load.seconds:.1f} s{rate} "
                f"by {load.loader}"
            )
        )
        lines += [Line(f"note: {note}", ("yellow",)) for note in load.notes]
    return lines


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


def check_lines(checks: Sequence[CheckResult], *, verbose: bool = False) -> list[Line]:
    """A line for each record; passed ones that differ only in device share one.

    Under a line that is not passed: its reason and remedy.
    """
    rows: list[tuple[tuple[str, str, str, str, str], str, str]] = []
    for check in checks:
        rows += _check_rows(check, verbose=verbose)
    texts = columns([cells for cells, _, _ in rows])
    lines = []
    for text, (_, outcome, below) in zip(texts, rows, strict=True):
        lines.append(Line(text, _COLOURS[outcome]))
        if below:
            lines.append(Line(f"         {below}", _COLOURS[outcome]))
    return lines


def _check_rows(
    check: CheckResult, *, verbose: bool
) -> list[tuple[tuple[str, str, str, str, str], str, str]]:
    rows: list[tuple[tuple[str, str, str, str, str], str, str]] = []
    outcome: str
    if check.outcome != "skipped":
        for group in grouped(check.records, each=verbose):
            first = group[0]
            outcome = first.outcome
            below = "; ".join(part for part in (first.reason.rstrip(". "), first.remedy) if part)
            cells = (
                _SHOWN.get(outcome, outcome).ljust(7),
                first.name,
                devices_text(group),
                expected_span(group),
                measured_span(group),
            )
            rows.append((cells, outcome, "" if outcome == "passed" else below))
    told = check.outcome == "passed" or (check.failed_records and not check.reason)
    # People's own tests that pass are pytest's to show; a check is never silent.
    if not told or (check.is_check and not rows):
        outcome = check.outcome
        name = check.nodeid.rpartition("::")[2] or check.nodeid
        cells = (_SHOWN.get(outcome, outcome).ljust(7), name, "", "", "")
        rows.append((cells, outcome, check.reason))
    return rows


def grouped(records: Sequence[Record], *, each: bool = False) -> list[list[Record]]:
    """Passed records of one name and unit together (in the place of the first); others alone.

    :param each: only pairs share a line, and only those that a matrix shows.
    """
    pairs = sum(pair_of(record.device) is not None for record in records)
    groups: dict[object, list[Record]] = {}
    for i, record in enumerate(records):
        together = record.outcome == "passed" and bool(record.device)
        if each:
            together = together and pairs > _HIDDEN_MATRIX and pair_of(record.device) is not None
        key: object = (record.name, record.unit) if together else i
        groups.setdefault(key, []).append(record)
    return list(groups.values())


def devices_text(group: Sequence[Record]) -> str:
    """``GPU 2``, ``4 GPUs``, ``12 pairs``, ``3 chains``."""
    if len(group) == 1:
        return shown_device(group[0].device)
    kinds = {_kind(record.device) for record in group}
    kind = kinds.pop() if len(kinds) == 1 else "devices"
    return f"{len(group)} {kind}"


def _kind(device: str) -> str:
    arrows = device.count(" -> ")
    if arrows:
        return "pairs" if arrows == 1 else "chains"
    return "GPUs" if shown_device(device).startswith("GPU ") else "devices"


def expected_span(group: Sequence[Record]) -> str:
    return _span([record.expected for record in group], group, expected_text(group[0]))


def measured_span(group: Sequence[Record]) -> str:
    return _span([record.measured for record in group], group, measured_text(group[0]))


def _span(values: Sequence[object], group: Sequence[Record], single: str) -> str:
    """One text if all agree; ``148.2 to 201.3 GB/s`` for numbers; else ``various``."""
    if len(set(values)) == 1:
        return single
    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        ordered = sorted(v for v in values if isinstance(v, int | float))
        unit = group[0].unit
        if unit == "bytes":
            return f"{gib(ordered[0])} to {gib(ordered[-1])}"
        return f"{number(ordered[0])} to {number(ordered[-1])} {unit}".rstrip()
    return "various"


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
        if len(matrix.cells) <= _HIDDEN_MATRIX or not numeric:
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


def plan_lines(plan: Plan) -> list[Line]:
    """``--gpu-plan``: a row a device, then what does not fit, what is off the GPUs, what to do."""
    rows = [
        (
            "device",
            "layers",
            "weights",
            "KV",
            "activations",
            "reserve",
            "peak",
            "limit",
            "",
        )
    ]
    markups: list[tuple[str, ...]] = []
    for device in plan.devices:
        on_gpu = device.device.startswith("cuda:")
        if not on_gpu and not device.weights_bytes:
            continue
        lack = device.peak_bytes - device.limit_bytes
        limited = on_gpu
        verdict = "GiB"
        if limited:
            verdict = f"GiB, lacks {gib(lack)}" if lack > 0 else f"GiB, {gib(-lack)} left"
        rows.append(
            (
                shown_device(device.device),
                layers_text(device.layers),
                gib_cell(device.weights_bytes),
                gib_cell(device.kv_bytes),
                gib_cell(device.activation_bytes),
                gib_cell(device.reserve_bytes),
                gib_cell(device.peak_bytes),
                gib_cell(device.limit_bytes) if limited else "-",
                verdict,
            )
        )
        markups.append(("red",) if limited and lack > 0 else () if on_gpu else ("yellow",))
    texts = columns(rows, right=range(2, 8))
    architecture = plan.architecture
    lines = [
        Line(
            f"{architecture.model} in {architecture.tier} ({architecture.dtype}): "
            f"{gib(plan.weights_bytes)} of weights, placement {plan.placement}, "
            f"context {plan.context_tokens} tokens x {plan.batch}"
        ),
        Line(""),
        Line(texts[0], ("bold",)),
        *(Line(text, markup) for text, markup in zip(texts[1:], markups, strict=True)),
        Line(""),
    ]
    if plan.offloaded:
        lines.append(Line(f"off the GPUs: {block_list(plan.offloaded)}", ("red",)))
    lines += [Line(f"not accounted for: {text}", ("yellow",)) for text in architecture.unknown]
    lines += [Line(reason, ("red",)) for reason in plan.reasons]
    lines += [Line(f"remedy: {remedy}") for remedy in plan.remedies]
    lines.append(
        Line("the plan fits", ("green", "bold"))
        if plan.fits
        else Line("the plan does not fit", ("red", "bold"))
    )
    return lines


def table_lines(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()
) -> list[Line]:
    """Any table (what to rent, fleets): a bold head and aligned rows."""
    texts = columns([head, *rows], right=right)
    return [Line(texts[0], ("bold",)), *(Line(text) for text in texts[1:])]


def rent_lines(rows: Sequence[RentRow], plan: Plan, *, most: int = 12) -> list[Line]:
    """What to rent for the plan's model and context, cheapest tokens first.

    ::

        rent     tier   $/h   headroom GiB  tokens/s  $ per million tokens
        4xA6000  4bit   1.96          34.1         9                  60.1
    """
    if not rows:
        return []
    cells = [
        (
            row.spec,
            row.tier,
            f"{row.price_usd_hour:.2f}",
            f"{row.headroom_bytes / GIB:.1f}",
            f"{row.tokens_per_second:.0f}",
            f"{row.usd_per_million_tokens:.1f}",
        )
        for row in rows[:most]
    ]
    head = ("rent", "tier", "$/h", "headroom GiB", "tokens/s", "$ per million tokens")
    more = f" ({len(rows) - most} more rows not shown)" if len(rows) > most else ""
    return [
        Line(""),
        Line(
            f"what to rent for {plan.context_tokens} tokens x {plan.batch}, balanced placement; "
            f"prices and speeds are estimates{more}"
        ),
        *table_lines(head, cells, right=range(2, 6)),
    ]
