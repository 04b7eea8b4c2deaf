"""``report.html``: one file that opens anywhere, asks the network for nothing and runs no script.

The verdict and its remedy first, then the GPUs, the pictures, the checks and the rest. Every
text of a run is escaped. Imports records and units.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from ..records.check import Record
from ..records.report import CheckResult, RunReport
from .atomic import write_atomic
from .folder import HTML_FILE
from .pictures import copy_pictures, gpu_pictures, have_matplotlib, vram_pictures
from .tables import gpu_rows, phase_table
from .terminal import (
    devices_text,
    expected_span,
    grouped,
    measured_span,
    notes,
)
from .words import printable

NO_PICTURES = "pictures need matplotlib: pip install 'pytest-multigpu[html]'"
_RANK = {"failed": 0, "error": 1, "unknown": 2, "warned": 3, "skipped": 4, "passed": 5}

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --page: #fff; --soft: #f3f4f6; --line: #d4d8dd;
  --muted: #59616b; --good: #11703a; --bad: #b3261e; --care: #8a5a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --page: #15181c; --soft: #1f242a;
  --line: #39414a; --muted: #a3acb7; --good: #5fd08a; --bad: #ff8a80; --care: #f0b64d; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 62rem; color: var(--ink); background: var(--page);
  font: 16px/1.45 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.9rem; margin: 0; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
header { padding: 1rem 1.2rem; background: var(--soft); border-left: .5rem solid var(--muted);
  border-radius: .3rem; }
header.passed { border-color: var(--good); } header.failed { border-color: var(--bad); }
header p, header ul { margin: .4rem 0 0; } .muted { color: var(--muted); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; overflow-wrap: normal; }
th { white-space: nowrap; } td.number, th.number { text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
td.why { min-width: 16rem; } td.name { min-width: 8rem; }
td.tight, td.mark { white-space: nowrap; }
.passed .mark { color: var(--good); } .failed .mark, .error .mark { color: var(--bad);
  font-weight: 700; }
.warned .mark, .unknown .mark, .skipped .mark { color: var(--care); }
figure { margin: 0; overflow-x: auto; } figure svg { display: block; width: 100%;
  max-width: 44rem; min-width: 20rem; height: auto; }
code { font-size: .85rem; }
"""


def page(report: RunReport) -> str:
    """The whole page. Without matplotlib it says so where the pictures would be."""
    verdict = report.verdict
    word = "did not finish" if verdict is None else verdict.word
    parts = [_head(report, word), *_gpus(report)]
    parts += _pictures(report)
    parts += _checks(report.checks)
    parts += _phases(report)
    parts += _versions(report)
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # No script, nothing from elsewhere: what a run printed cannot do anything here.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'; img-src data:\">\n"
        '<link rel="icon" href="data:,">\n'
        f"<title>{word}: GPU report</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def write_page(folder: Path, report: RunReport) -> Path:
    """``report.html`` in the folder, whole or not at all; ``OSError`` if it cannot be written."""
    path = folder / HTML_FILE
    write_atomic(path, page(report))
    return path


def _e(text: object) -> str:
    return html.escape(printable(str(text)))


def _head(report: RunReport, word: str) -> str:
    verdict = report.verdict
    mark = "" if verdict is None or not verdict.checked else "passed" if verdict.ready else "failed"
    lines = [f'<header class="{mark}">', f"<h1>{_e(word)}</h1>"]
    if verdict is None:
        running = report.running or "no test"
        lines.append(f"<p>When this was written, {_e(running)} was running.</p>")
    elif verdict.ready or not verdict.reasons:
        lines.append(f"<p>{_e(verdict.line.partition(': ')[2])}</p>")
    else:
        lines.append(f"<p><strong>{_e(verdict.reasons[0])}</strong></p>")
        if len(verdict.reasons) > 1:
            items = "".join(f"<li>{_e(reason)}</li>" for reason in verdict.reasons[1:])
            lines.append(f"<ul>{items}</ul>")
    facts = [f"tier {report.tier or 'none'} (asked for: {report.tier_asked})"]
    if report.machine is not None and report.machine.simulated:
        facts.append(f"simulated machine {report.machine.simulated}: plan only")
    elif report.tier == "cpu":
        facts.append("no GPU was checked")
    if verdict is not None:
        facts.append(f"exit code {verdict.exit_code}")
    facts.append(f"{report.wall_seconds:.1f} s")
    if report.started:
        when = datetime.fromtimestamp(report.started, tz=timezone.utc)
        facts.append(f"{when:%Y-%m-%d %H:%M} UTC")
    lines.append(f'<p class="muted">{_e(" | ".join(facts))}</p>')
    lines.append("</header>")
    return "\n".join(lines)


def _table(
    head: Sequence[str],
    rows: Sequence[tuple[str, Sequence[str]]],
    *,
    classes: Sequence[str] = (),
) -> str:
    """``rows`` are (class, cells); ``classes`` one for each column."""
    kinds = [*classes, *[""] * (len(head) - len(classes))]
    heads = "".join(f'<th class="{k}">{_e(h)}</th>' for h, k in zip(head, kinds, strict=True))
    lines = [f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>']
    for mark, cells in rows:
        columns = "".join(
            f'<td class="{k}">{_e(c)}</td>' for c, k in zip(cells, kinds, strict=True)
        )
        lines.append(f'<tr class="{mark}">{columns}</tr>')
    lines.append("</tbody></table></div>")
    return "\n".join(lines)


def _gpus(report: RunReport) -> list[str]:
    rows = gpu_rows(report)
    said = [f"<p>{_e(line.text)}</p>" for line in notes(report)]
    if not rows:
        return ["<h2>GPUs</h2>", "<p>No GPU was found.</p>", *said]
    head = ("GPU", "name", "layers", "weights", "KV", "predicted", "measured", "limit", "")
    number = "number"
    table = _table(
        head,
        [("failed" if "red" in row.markup else "", (*row.cells[:8], row.remark)) for row in rows],
        classes=("tight", "name", "tight", number, number, number, number, number, "mark"),
    )
    return ["<h2>GPUs</h2>", table, '<p class="muted">Sizes in GiB.</p>', *said]


def _pictures(report: RunReport) -> list[str]:
    if not have_matplotlib():
        return [f'<p class="muted">{_e(NO_PICTURES)}</p>']
    parts: list[str] = []
    for title, draw in (
        ("Predicted beside measured", gpu_pictures),
        ("Between GPUs", copy_pictures),
        ("VRAM over the run", vram_pictures),
    ):
        try:
            drawn = [_figure(svg, title) for svg in draw(report)]
        except Exception as error:
            # Drawing is somebody else's code on this machine; the numbers must still come out.
            kind = type(error).__name__
            drawn = [
                f'<p class="muted">this picture could not be drawn: {_e(kind)}: {_e(error)}</p>'
            ]
        if drawn:
            parts += [f"<h2>{title}</h2>", *drawn]
    return parts


def _figure(svg: str, label: str) -> str:
    labelled = svg.replace("<svg", f'<svg role="img" aria-label="{_e(label)}"', 1)
    return f"<figure>{labelled}</figure>"


def _checks(checks: Sequence[CheckResult]) -> list[str]:
    rows: list[tuple[str, Sequence[str]]] = []
    for check in checks:
        name = check.nodeid.rpartition("::")[2] or check.nodeid
        if check.outcome != "skipped":
            rows += [_record(group, check) for group in grouped(check.records, each=True)]
        untold = check.outcome != "passed" and (check.reason or not check.failed_records)
        if untold or not (check.records or check.outcome == "skipped"):
            cells = (check.outcome, name, "", "", "", check.reason, f"{check.seconds:.1f}")
            rows.append((check.outcome, cells))
    if not rows:
        return ["<h2>Checks</h2>", "<p>No check ran.</p>"]
    rows.sort(key=lambda row: _RANK[row[0]])
    head = ("verdict", "check", "device", "expected", "measured", "why, and what to do", "s")
    table = _table(head, rows, classes=("mark", "name", "tight", "name", "name", "why", "number"))
    return ["<h2>Checks</h2>", table]


def _record(group: Sequence[Record], check: CheckResult) -> tuple[str, tuple[str, ...]]:
    record = group[0]
    why = "; ".join(part for part in (record.reason.rstrip(". "), record.remedy) if part)
    return (
        record.outcome,
        (
            record.outcome,
            record.name,
            devices_text(group),
            expected_span(group),
            measured_span(group),
            why if record.outcome != "passed" else "",
            f"{check.seconds:.1f}",
        ),
    )


def _phases(report: RunReport) -> list[str]:
    lines = phase_table(report)
    if not lines:
        return []
    text = "\n".join(line.text for line in lines)
    return ["<h2>Peaks</h2>", f'<div class="scroll"><pre>{_e(text)}</pre></div>']


def _versions(report: RunReport) -> list[str]:
    rows = [("", (name, version)) for name, version in sorted(report.versions.items())]
    machine = report.machine
    if machine is not None and machine.driver:
        rows.append(("", ("driver", f"{machine.driver} (CUDA {machine.cuda or 'unknown'})")))
    return ["<h2>Versions</h2>", _table(("package", "version"), rows)] if rows else []
