"""Print what the quick tier's CUDA worker does on this machine, what each step catches, its ms.

``python benchmarks/quick_cost.py`` prints a Markdown table for the README. Options: ``--runs N``
(the median of N runs, default 3), ``--devices cpu,cpu`` to try it without GPUs.
"""

from __future__ import annotations

import argparse
import sys
from statistics import median

from pytest_multigpu.machine.worker import start_worker
from pytest_multigpu.records.worker import WorkerReport

CATCHES = {
    "import torch": "a torch that does not import",
    "CUDA start": "a driver too old for this torch; GPUs hidden from CUDA",
    "contexts": "a GPU that hangs or cannot make a context",
    "devices": "an order or number of GPUs other than NVML's; an architecture without kernels",
    "host buffer": "pinned memory that cannot be had",
    "uploads": "bytes changed between host and GPU",
    "copies": "pairs that deliver zeros, stale or wrong bytes",
    "chains": "copies that go wrong only in chains without synchronisation",
    "arithmetic": "a GPU that computes other bits than its siblings, or wrong numbers",
    "load": "a GPU slower than its siblings under load (clocks, heat, power)",
    "memory speed": "memory slower than the siblings' or than the datasheet allows",
    "host speed": "a PCIe link at reduced width or generation",
    "pair speed": "a pair much slower than the others with the same link",
    "context sizes": "what a context takes here (for the plan)",
}


def table(reports: list[WorkerReport]) -> str:
    """Markdown: a row for each step, median milliseconds, and the whole run.

    >>> print(table([WorkerReport(seconds=0.5)]))
    | step | ms | catches |
    |---|---|---|
    | start of the process and its end | 500 | |
    | in all | 500 | |
    """
    rows = ["| step | ms | catches |", "|---|---|---|"]
    in_steps = 0.0
    for step in reports[0].steps:
        times = [
            found.seconds
            for report in reports
            if (found := report.step(step.name)) is not None and found.seconds is not None
        ]
        middle = median(times) if times else 0.0
        in_steps += middle
        rows.append(f"| {step.name} | {middle * 1000:.0f} | {CATCHES[step.name]} |")
    whole = median(report.seconds for report in reports)
    rows.append(f"| start of the process and its end | {(whole - in_steps) * 1000:.0f} | |")
    rows.append(f"| in all | {whole * 1000:.0f} | |")
    return "\n".join(rows)


def main() -> int:
    """1 if any run failed: its table would not be one of a whole run."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--devices", default="cuda")
    options = parser.parse_args()
    reports = [start_worker(devices=options.devices).result() for _ in range(options.runs)]
    for report in reports:
        if report.failure is not None:
            sys.stderr.write(report.failure + "\n")
            return 1
    names = [device.name for device in reports[0].devices]
    versions = reports[0].versions
    if versions is None or not names:
        sys.stderr.write("torch sees no GPU\n")
        return 1
    sys.stdout.write(
        f"{len(names)} x {', '.join(sorted(set(names)))}; torch {versions.torch}; "
        f"median of {options.runs} runs\n\n{table(reports)}\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
