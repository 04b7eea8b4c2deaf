"""Which peaks other orders of addresses would give, beside those measured.

    python benchmarks/orders.py results/peaks-h100x4.json --simulate 4xH100 --out FILE.md

torch takes the smallest cached block that is large enough, and of equally large ones that of the
lowest address. Which one that is, the driver decides: top down, but in a process that gave segments
back before, as several cases in one do, what is left of their places is given out first, which a
plan can't know. For every case that the plan misses by more than ``--beyond`` MiB
the replay is made again with random addresses, and each outcome is shown as predicted less
measured.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import peaks
from peak_table import Case, read_cases

from pytest_multigpu.model.architecture import describe
from pytest_multigpu.model.config import resolve_config
from pytest_multigpu.planning.allocator import Allocator, Held
from pytest_multigpu.planning.balance import balanced
from pytest_multigpu.planning.simulate import simulate
from pytest_multigpu.records.machine import Machine
from pytest_multigpu.units import MIB

ADDRESSES = 1 << 60


def outcomes(case: Case, model: str, machine: Machine, orders: int) -> Counter[int]:
    """Predicted less measured in MiB, and in how many orders."""
    architecture = describe(resolve_config(model), tier=case.tier)  # type: ignore[arg-type]
    own = peaks.first_gpus(machine, case.gpus)
    placed = balanced(architecture, own, context_tokens=2048, batch=1)
    segment, found = Allocator._segment, Counter[int]()
    for seed in range(orders):
        rng = random.Random(seed)  # noqa: S311 - nothing secret

        def anywhere(self: Allocator, size: int, small: bool, rng: random.Random = rng) -> Held:
            held = segment(self, size, small)
            held.address = rng.randrange(ADDRESSES)
            return held

        with mock.patch.object(Allocator, "_segment", anywhere):
            plan = peaks.plan_of(architecture, own, placed, case.context_tokens, case.batch)
        device = next(d for d in plan.devices if d.device == f"cuda:{case.gpu}")
        found[(peaks.predicted(device, case.phase) - case.measured_bytes) // MIB] += 1
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="peaks with addresses in random orders")
    parser.add_argument("measured", type=Path, help="FILE.json of peaks.py")
    parser.add_argument("--simulate", required=True, help="the machine that it was measured on")
    parser.add_argument("--model", default="llama-3.3-70b")
    parser.add_argument("--orders", type=int, default=40)
    parser.add_argument("--beyond", type=int, default=256, help="MiB")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    machine = simulate(arguments.simulate)
    cases = [
        case
        for case in peaks.predicted_again(read_cases(arguments.measured), machine, arguments.model)
        if case.outcome == "measured" and abs(case.error_bytes) > arguments.beyond * MIB
    ]
    lines = [
        f"# Peaks in {arguments.orders} random orders of addresses: {arguments.measured.name}",
        "",
        f"Cases that the plan misses by more than {arguments.beyond} MiB. Errors are predicted "
        "less measured, in MiB.",
        "",
        "| tier | GPUs | context | batch | phase | GPU | error | in how many orders which error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        found = outcomes(case, arguments.model, machine, arguments.orders)
        shown = ", ".join(f"{count} x {error:+d}" for error, count in sorted(found.items()))
        lines.append(
            f"| {case.tier} | {case.gpus} | {case.context_tokens} | {case.batch} | {case.phase} "
            f"| {case.gpu} | {case.error_bytes // MIB:+d} | {shown} |"
        )
        print(lines[-1], flush=True)
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
