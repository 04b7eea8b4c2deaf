"""Rows of predicted beside measured peaks: as records, in JSON and as a table.

What ``peaks.py`` and ``families.py`` write, and ``--again``, ``orders.py`` and the tests read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median

from pytest_multigpu.units import MIB, gib


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row: the worst GPU (by error beyond tolerance) of one phase."""

    model: str = ""
    """Where a file has several."""
    tier: str
    gpus: int
    context_tokens: int
    batch: int
    phase: str
    outcome: str
    """``measured``, or why not."""
    gpu: int | None = None
    predicted_bytes: int = 0
    measured_bytes: int = 0
    reserved_bytes: int = 0
    """``torch.cuda.max_memory_reserved``; what NVML shows beyond it is outside the allocator."""
    allocated_bytes: int = 0

    @property
    def error_bytes(self) -> int:
        return self.predicted_bytes - self.measured_bytes

    @property
    def within(self) -> bool:
        """Within 2% or 256 MiB, whichever is larger."""
        return abs(self.error_bytes) <= max(256 * MIB, self.measured_bytes * 2 // 100)

    @property
    def wrong(self) -> bool:
        """Measured and not within, or planned to fit and did not run."""
        if self.outcome == "measured":
            return not self.within
        return self.outcome.startswith(("OUT OF", "FAILED"))


def write(cases: Sequence[Case], hardware: str, out: Path, more: str = "") -> None:
    """``OUT.json`` and ``OUT.md``.

    :param more: text below the table.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            **{name: value for name, value in asdict(case).items() if name != "model" or value},
            "error_bytes": case.error_bytes,
            "within": case.within,
        }
        for case in cases
    ]
    text = json.dumps({"hardware": hardware, "cases": rows}, indent=1)
    out.with_suffix(".json").write_text(text + "\n")
    out.with_suffix(".md").write_text(table(cases, hardware) + more)


def read_cases(path: Path) -> list[Case]:
    """Of an ``OUT.json``; what is computed from the rest is left out."""
    known = {field.name for field in fields(Case)}
    rows = json.loads(path.read_text())["cases"]
    return [Case(**{k: v for k, v in row.items() if k in known}) for row in rows]


def read_hardware(path: Path) -> str:
    return str(json.loads(path.read_text())["hardware"])


def table(cases: Sequence[Case], hardware: str) -> str:
    """Markdown: one line a case and phase, and how many are within."""
    head = "| tier | GPUs | context | batch | phase | GPU | predicted | measured | error | within |"
    rule = "|---" * 10 + "|"
    if any(case.model for case in cases):
        head, rule = "| model " + head, "|---" + rule
    lines = [
        f"# Predicted and measured peaks: {hardware}",
        "",
        "Worst GPU of each case. Within: 2% of the measured peak or 256 MiB, the larger.",
        "",
        head,
        rule,
        *map(row, cases),
    ]
    measured = [case for case in cases if case.outcome == "measured"]
    if measured:
        within = sum(case.within for case in measured)
        lines += ["", f"{within} of {len(measured)} within."]
    return "\n".join(lines) + "\n"


def row(case: Case) -> str:
    name = f"| {case.model} " if case.model else ""
    head = f"{name}| {case.tier} | {case.gpus} | {case.context_tokens} | {case.batch} "
    gpu = "" if case.gpu is None else case.gpu
    predicted = gib(case.predicted_bytes, 2) if case.predicted_bytes else ""
    head += f"| {case.phase} | {gpu} | {predicted} "
    if case.outcome != "measured":
        return f"{head}| {case.outcome} | | |"
    return (
        f"{head}| {gib(case.measured_bytes, 2)} | {case.error_bytes / MIB:+.0f} MiB "
        f"| {'yes' if case.within else 'NO'} |"
    )


def constants(cases: Sequence[Case]) -> str:
    """A paragraph: what the measurements suggest for ``costs.py``; empty without any."""
    load, after = (
        [
            case.measured_bytes - case.reserved_bytes
            for case in cases
            if case.outcome == "measured" and case.phase == phase
        ]
        for phase in ("load", "generate")
    )
    if not load or not after:
        return ""
    context, warm = median(load) / MIB, median(after) / MIB
    return (
        f"\nOutside torch's allocator: {context:.0f} MiB after loading, {warm:.0f} MiB after "
        f"generating. costs.py: context_bytes = {context:.0f} MiB, "
        f"module_bytes = {warm - context:.0f} MiB.\n"
    )
