"""The pictures of ``report.html``: static SVG by matplotlib, for a light and a dark page.

matplotlib is optional (``pytest-multigpu[html]``) and is imported inside the functions. Text and
axes are drawn in ``currentColor``, so that the page's colours hold. Imports records and units.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..records.plan import DevicePlan
from ..records.report import RunReport
from ..units import GIB
from .tables import Matrix, pair_matrices
from .words import matrix_cell, measured_peaks, printable, shown_device

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Matplotlib needs a colour; the page replaces this one by its own.
_INK = "#010203"
_STACK = (
    ("weights", "#3b82c4"),
    ("KV cache", "#e09a2b"),
    ("activations", "#57a773"),
    ("reserve", "#9a8fbf"),
)
_MEASURED, _LIMIT = "#c2477f", "#d43d3d"
_LINES = (
    "#3b82c4",
    "#e09a2b",
    "#57a773",
    "#c2477f",
    "#9a8fbf",
    "#2aa6a6",
    "#a07a4f",
    "#8a8f98",
)
_NAMED_TESTS = 12


def have_matplotlib() -> bool:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def gpu_pictures(report: RunReport) -> list[str]:
    """Each GPU's predicted bytes stacked, its measured peak below, its limit as a red line."""
    plan = report.plan
    devices = [d for d in plan.devices if d.device.startswith("cuda:")] if plan else []
    if not devices:
        return []
    peaks = measured_peaks(report)

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for row, device in enumerate(devices):
            _stack(axes, row, device)
            seen = peaks.get(device.device)
            if seen is not None:
                axes.barh(
                    row + 0.28,
                    seen / GIB,
                    height=0.2,
                    color=_MEASURED,
                    label="measured peak" if row == 0 else None,
                )
            limit = device.limit_bytes / GIB
            label = "limit" if row == 0 else None
            axes.plot([limit] * 2, [row - 0.36, row + 0.42], color=_LIMIT, lw=2, label=label)
        axes.set_yticks(range(len(devices)), [_tick(device) for device in devices])
        axes.invert_yaxis()
        axes.set_xlim(left=0)
        axes.set_xlabel("GiB in use at the worst moment")
        axes.legend(loc="lower center", bbox_to_anchor=(0.45, 1), ncols=3, frameon=False)

    return [_svg("gpus", 1.5 + 0.55 * len(devices), draw)]


def _tick(device: DevicePlan) -> str:
    layers = device.layers
    return shown_device(device.device) + (f"\nlayers {layers[0]}-{layers[1]}" if layers else "")


def _stack(axes: Axes, row: int, device: DevicePlan) -> None:
    left = 0.0
    sizes = (
        device.weights_bytes,
        device.kv_bytes,
        device.activation_bytes,
        device.reserve_bytes,
    )
    for (name, colour), size in zip(_STACK, sizes, strict=True):
        label = name if row == 0 else None
        axes.barh(row - 0.1, size / GIB, left=left, height=0.5, color=colour, label=label)
        left += size / GIB


def copy_pictures(report: RunReport) -> list[str]:
    """A heat map for each set of numbers between pairs of GPUs; bad pairs carry a red frame."""
    return [
        _heat_map(f"pairs{i}", matrix)
        for i, matrix in enumerate(pair_matrices(report.checks))
        if any(_numeric(record.measured) for record in matrix.cells.values())
    ]


def _numeric(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _heat_map(name: str, matrix: Matrix) -> str:
    from matplotlib.patches import Rectangle

    count = len(matrix.devices)

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        values = [
            [
                float(record.measured)
                if record is not None
                and isinstance(record.measured, int | float)
                and not isinstance(record.measured, bool)
                else float("nan")
                for record in (matrix.cells.get((a, b)) for b in matrix.devices)
            ]
            for a in matrix.devices
        ]
        finite = [v for row in values for v in row if v == v and abs(v) != float("inf")]  # noqa: PLR0124
        top = max(finite, default=1.0) or 1.0
        # From zero, so that equal links look equal.
        image = axes.pcolormesh(
            range(count), range(count), values, cmap="viridis", vmin=min([0.0, *finite]), vmax=top
        )
        axes.invert_yaxis()
        axes.set_aspect("equal")
        for (a, b), record in matrix.cells.items():
            y, x = matrix.devices.index(a), matrix.devices.index(b)
            value = values[y][x]
            colour = "black" if value > 0.6 * top else "white"
            text = matrix_cell(value) if value == value else "?"  # noqa: PLR0124
            axes.text(x, y, text, ha="center", va="center", fontsize=9, color=colour)
            if record.outcome != "passed":
                square = Rectangle((x - 0.47, y - 0.47), 0.94, 0.94)
                square.set(edgecolor=_LIMIT, facecolor="none", linewidth=3)
                axes.add_patch(square)
        names = [printable(device) for device in matrix.devices]
        axes.set_xticks(range(count), names, rotation=45 if count > 4 else 0)
        axes.set_yticks(range(count), names)
        axes.set_xlabel("to")
        axes.set_ylabel("from")
        label = f"{matrix.name} ({matrix.unit})" if matrix.unit else matrix.name
        bar = figure.colorbar(image, ax=axes, label=printable(label), shrink=0.9)
        if bar.solids is not None:
            bar.solids.set_rasterized(False)
            bar.solids.set_edgecolor("face")

    return _svg(name, 1.6 + 0.45 * max(count, 3), draw)


def vram_pictures(report: RunReport) -> list[str]:
    """Bytes in use on every GPU over the run, with tests as bands and limits as dashes."""
    if not report.vram:
        return []

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        limits = {d.device: d.limit_bytes for d in report.plan.devices} if report.plan else {}
        devices = list(dict.fromkeys(sample.device for sample in report.vram))
        for i, device in enumerate(devices):
            samples = [sample for sample in report.vram if sample.device == device]
            axes.plot(
                [sample.seconds for sample in samples],
                [sample.used_bytes / GIB for sample in samples],
                color=_LINES[i % len(_LINES)],
                lw=1.6,
                label=shown_device(device),
            )
        known = sorted({size for d, size in limits.items() if d in devices and size})
        for i, limit in enumerate(known):
            label = "limit" if i == 0 else None
            axes.axhline(limit / GIB, color=_LIMIT, ls="--", lw=1.2, label=label)
        longest = sorted(report.spans, key=lambda span: span.start - span.end)
        named = {id(span) for span in longest[:_NAMED_TESTS]}
        for i, span in enumerate(report.spans):
            alpha = 0.22 if i % 2 else 0.11
            axes.axvspan(span.start, span.end, color="#8a8f98", alpha=alpha, lw=0)
            if id(span) in named and report.wall_seconds:
                wide = (span.end - span.start) / report.wall_seconds > 0.02
                if wide:
                    name = span.nodeid.rpartition("::")[2].removeprefix("test_")
                    axes.text(
                        (span.start + span.end) / 2,
                        0.03,
                        printable(name)[:40],
                        rotation=90,
                        ha="center",
                        va="bottom",
                        fontsize=9,
                        transform=axes.get_xaxis_transform(),
                    )
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("seconds since the run started")
        axes.set_ylabel("GiB in use")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=5, frameon=False)

    return [_svg("vram", 3.6, draw)]


def _svg(name: str, height: float, draw: Callable[[Figure], None]) -> str:
    """Drawn, then made fit to stand in a page: no XML head, own ids, the page's colours."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        # A "$" in a GPU's or a test's name is not mathematics.
        "text.parse_math": False,
        "font.size": 12,
        "font.family": "sans-serif",
        "text.color": _INK,
        "axes.edgecolor": _INK,
        "axes.labelcolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
    }
    # A name in a script that the font lacks is a warning; under -W error it would be an exception.
    with mpl.rc_context(style), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure = Figure(figsize=(6.6, height), layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = text.replace(_INK, "currentColor")
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    return re.sub(r'href="#', f'href="#{name}-', text)
