"""GitHub Actions: the step summary (Markdown) and annotations, worst first, within the limits.

::

    ::error title=copies between GPUs (GPU 0 -> GPU 2)::4096 bytes differ; run ...

Limits from GitHub's documentation: a step summary holds 1 MiB; a step shows 10 error and
10 warning annotations. Imports records and units.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from ..records.check import Record
from ..records.report import CheckResult, RunReport
from .tables import gpu_rows
from .terminal import devices_text, expected_span, grouped, measured_span
from .words import expected_text, measured_text, shown_device

SUMMARY_BYTES = 1 << 20
ANNOTATIONS = 10
_RANK = {"failed": 0, "error": 1, "unknown": 2, "warned": 3, "skipped": 4, "passed": 5}


def annotation_lines(report: RunReport) -> list[str]:
    """Workflow commands: at most 10 errors, then at most 10 warnings."""
    errors: list[tuple[int, str, str]] = []
    warnings: list[tuple[str, str]] = []
    for check in report.checks:
        name = check.nodeid.rpartition("::")[2] or check.nodeid
        if check.outcome == "skipped":
            continue
        for record in check.records:
            title = record.name + (f" ({shown_device(record.device)})" if record.device else "")
            if record.outcome == "failed":
                errors.append((2 if record.shortfall else 0, title, _message(record)))
            elif record.outcome in ("warned", "unknown"):
                warnings.append((title, _message(record)))
        if check.failed and (check.reason or not check.failed_records):
            rank = 2 if check.shortfall else 1
            errors.append((rank, name, f"{check.nodeid} {check.outcome}: {check.reason}"))
    verdict = report.verdict
    if verdict is not None and not verdict.ready and verdict.checked and not errors:
        errors.append((0, verdict.word, verdict.line))
    errors.sort(key=lambda row: row[0])
    lines = [_command("error", title, text) for _, title, text in _capped(errors)]
    return lines + [
        _command("warning", title, text)
        for _, title, text in _capped([(0, title, text) for title, text in warnings])
    ]


def _capped(rows: list[tuple[int, str, str]]) -> list[tuple[int, str, str]]:
    if len(rows) <= ANNOTATIONS:
        return rows
    rest = rows[ANNOTATIONS - 1 :]
    more = "; ".join(title for _, title, _ in rest[:20])
    return [*rows[: ANNOTATIONS - 1], (0, f"{len(rest)} more", more)]


def _message(record: Record) -> str:
    parts = [record.reason.rstrip(". "), record.remedy]
    text = "; ".join(part for part in parts if part)
    return text or f"expected {expected_text(record)}, measured {measured_text(record)}"


def _command(level: str, title: str, message: str) -> str:
    escaped = title.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    escaped = escaped.replace(":", "%3A").replace(",", "%2C")
    body = message.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    return f"::{level} title={escaped}::{body}"


def step_summary(report: RunReport, *, limit_bytes: int = SUMMARY_BYTES) -> str:
    """Markdown: the verdict, the checks worst first, the GPUs. Cut at whole rows to the limit."""
    verdict = report.verdict
    head = ["## " + _cell(verdict.line if verdict else "the run did not finish"), ""]
    if verdict is not None and len(verdict.reasons) > 1:
        head += [f"- {_cell(reason)}" for reason in verdict.reasons[:20]] + [""]
    head += _gpu_table(report)
    rows = sorted(_rows(report.checks), key=lambda row: _RANK[row[0]])
    table = [
        "| verdict | check | device | expected | measured | why, and what to do |",
        "|---|---|---|---|---|---|",
        *("| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows),
    ]
    lines = head + (table if rows else [])
    text = "\n".join(lines) + "\n"
    if len(text.encode()) <= limit_bytes:
        return text
    note = "\n\n(cut: more than GitHub shows; see report.json)\n"
    kept: list[str] = []
    room = limit_bytes - len(note.encode())
    for line in lines:
        room -= len(line.encode()) + 1
        if room < 0:
            break
        kept.append(line)
    return "\n".join(kept) + note


def _gpu_table(report: RunReport) -> list[str]:
    rows = gpu_rows(report)
    if not rows:
        return []
    head = ("GPU", "name", "layers", "weights", "KV", "predicted", "measured", "limit", "in GiB")
    return [
        "| " + " | ".join(head) + " |",
        "|---|---|---|" + "---:|" * 5 + "---|",
        *(
            "| " + " | ".join(_cell(cell) for cell in (*row.cells[:8], row.remark)) + " |"
            for row in rows
        ),
        "",
    ]


def _rows(checks: tuple[CheckResult, ...]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for check in checks:
        name = check.nodeid.rpartition("::")[2] or check.nodeid
        if check.outcome != "skipped":
            for group in grouped(check.records):
                first = group[0]
                rows.append(
                    (
                        first.outcome,
                        first.name,
                        devices_text(group),
                        expected_span(group),
                        measured_span(group),
                        "" if first.outcome == "passed" else _message(first),
                    )
                )
        if check.outcome != "passed" and (check.reason or not check.failed_records):
            rows.append((check.outcome, name, "", "", "", check.reason))
    return rows


_MARKDOWN = re.compile(r"([\\`*_\[\]<>|~#])")


def _cell(text: str) -> str:
    """Text that Markdown leaves as it is, on one line."""
    return _MARKDOWN.sub(r"\\\1", " ".join(text.split())).replace("&", "&amp;")


def write_step_summary(report: RunReport, environ: Mapping[str, str]) -> bool:
    """Append the summary to the file that ``GITHUB_STEP_SUMMARY`` names; False if it is unset.

    :raises OSError: the file cannot be written.
    """
    name = environ.get("GITHUB_STEP_SUMMARY")
    if not name:
        return False
    path = Path(name)
    used = path.stat().st_size if path.exists() else 0
    # Room for what earlier steps of this file wrote; a summary over the limit is shown not at all.
    text = step_summary(report, limit_bytes=max(1024, SUMMARY_BYTES - used - 1))
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
    return True
