"""Measured against predicted peaks of models that are not built like Llama, one GPU each.

    python benchmarks/families.py --out results/peaks-families
    python benchmarks/families.py --only gemma,mixtral --tiers 4bit --sizes 2048x8
    python benchmarks/families.py --dry-run --simulate 1xH100     # predictions only, no GPU
    python benchmarks/families.py --again results/peaks-families.json --simulate 1xH200 --out FILE
    python benchmarks/families.py --write DIR                     # a folder each, for --gpu-model

The shapes are those of published models (``family_configs.py``), the weights are synthesised. Each
row is measured as ``peaks.py`` does, by a process of its own, on a GPU that nothing else uses
meanwhile; the visible GPUs work side by side. Written after every model and tier to ``OUT.json``
and ``OUT.md``, by a dry run only where ``--out`` names one. ``--again`` measures nothing: it puts
the predictions of this commit beside peaks measured earlier.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import peaks
from family_configs import CONFIGS
from peak_table import Case, read_cases, read_hardware, row, write

from pytest_multigpu.model.architecture import describe
from pytest_multigpu.model.config import resolve_config
from pytest_multigpu.planning.simulate import simulate
from pytest_multigpu.records.machine import Machine
from pytest_multigpu.records.plan import Architecture, DeviceMap, Plan, Tier

Size = tuple[int, int]
"""Context in tokens and batch."""
PLACED: DeviceMap = {"": 0}


def rows_of(
    folder: Path, tier: Tier, machine: Machine, sizes: Sequence[Size], *, dry: bool
) -> Iterator[Case]:
    """All rows of one model and tier on the one visible GPU of ``machine``."""
    architecture = describe(resolve_config(str(folder)), tier=tier)
    for sentence in architecture.unknown:
        print(f"{folder.name} in {tier}: not accounted for: {sentence}", file=sys.stderr)
    told = False
    for context, batch in sizes:
        plan = peaks.plan_of(architecture, machine, PLACED, context, batch)
        for phase in peaks.PHASES if plan.fits else ("all",):
            if dry or not plan.fits:
                yield not_run(tier, plan, phase)
                continue
            work = (str(folder), architecture, machine, plan, PLACED, phase)
            loading, case = peaks.in_own_process(measured, *work)
            if not told:  # the same every time
                yield loading
                told = True
            yield case


def measured(
    folder: str,
    architecture: Architecture,
    machine: Machine,
    plan: Plan,
    placed: DeviceMap,
    phase: str,
) -> tuple[Case, Case]:
    """``peaks.measured`` on that GPU, whichever of the visible ones it is."""
    os.environ["CUDA_VISIBLE_DEVICES"] = machine.visible_gpus[0].uuid
    return peaks.measured(folder, architecture, machine, plan, placed, phase)


def not_run(tier: Tier, plan: Plan, phase: str) -> Case:
    device = plan.devices[0]
    return Case(
        tier=tier,
        gpus=1,
        context_tokens=plan.context_tokens,
        batch=plan.batch,
        phase=phase,
        outcome="not run" if plan.fits else "; ".join(plan.reasons),
        gpu=0,
        predicted_bytes=device.peak_bytes if phase == "all" else peaks.predicted(device, phase),
    )


def write_folders(root: Path, names: Sequence[str]) -> dict[str, Path]:
    folders = {}
    for name in names:
        folder = folders[name] = root / name.partition(",")[0]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(CONFIGS[name], indent=1) + "\n")
    return folders


def predicted_again(
    folders: dict[str, Path], machine: Machine, cases: Sequence[Case]
) -> Iterator[Case]:
    for name, folder in folders.items():
        mine = [case for case in cases if case.model == name]
        yield from peaks.predicted_again(mine, machine, str(folder))


def run(
    folders: dict[str, Path], machine: Machine, hardware: str, arguments: argparse.Namespace
) -> list[Case]:
    """Every model and tier; each visible GPU takes the next."""
    rows: dict[tuple[str, str], list[Case]] = {}
    free, lock = list(machine.visible), threading.Lock()

    def one(work: tuple[str, Tier]) -> None:
        name, tier = work
        with lock:
            index = free.pop()
        own = replace(machine, visible=(index,))
        found = rows_of(folders[name], tier, own, arguments.sizes, dry=arguments.dry_run)
        cases: list[Case] = []
        try:
            cases.extend(found)
        except Exception as error:  # one model's failure is a row; the others go on
            why = f"FAILED: {type(error).__name__}: {error}".splitlines()[0]
            cases.append(
                Case(tier=tier, gpus=1, context_tokens=0, batch=0, phase="all", outcome=why)
            )
        with lock:
            free.append(index)
            rows[name, tier] = [replace(case, model=name) for case in cases]
            print(*map(row, rows[name, tier]), sep="\n", flush=True)
            if arguments.out:
                write(in_order(), hardware, arguments.out)

    def in_order() -> list[Case]:
        return [
            case
            for name in folders
            for tier in arguments.tiers
            for case in rows.get((name, tier), [])
        ]

    works = [(name, tier) for name in folders for tier in arguments.tiers]
    with ThreadPoolExecutor(len(free)) as pool:
        list(pool.map(one, works))
    return in_order()


def main() -> int:
    parser = argparse.ArgumentParser(description="peaks of models that are not built like Llama")

    def sizes(text: str) -> list[Size]:
        pairs = [part.split("x") for part in text.split(",")]
        return [(int(context), int(batch)) for context, batch in pairs]

    def texts(text: str) -> list[str]:
        return text.split(",")

    parser.add_argument("--only", type=texts, default=[""], help="models whose name starts so")
    parser.add_argument("--tiers", type=texts, default=["16bit", "8bit", "4bit"])
    parser.add_argument("--sizes", type=sizes, default=[(2048, 1), (2048, 8), (8192, 1)])
    parser.add_argument(
        "--out", type=Path, help="default, except in a dry run: results/peaks-families"
    )
    parser.add_argument("--again", type=Path, help="predict anew beside what that file measured")
    parser.add_argument("--dry-run", action="store_true", help="predictions only")
    parser.add_argument("--simulate", help="a machine that isn't there, with --dry-run")
    parser.add_argument("--write", type=Path, help="write the folders there, and nothing else")
    arguments = parser.parse_args()
    if not arguments.out and not arguments.dry_run:
        arguments.out = Path("results/peaks-families")
    names = [name for name in CONFIGS if name.startswith(tuple(arguments.only))]
    if arguments.write:
        for folder in write_folders(arguments.write, names).values():
            print(folder)
        return 0
    if arguments.simulate:
        machine = simulate(arguments.simulate)
    else:
        from pytest_multigpu.machine.nvml import read_machine

        machine = read_machine()
    if not machine.visible:
        print(machine.problem or "no GPU is visible", file=sys.stderr)
        return 1
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as root:
        folders = write_folders(Path(root), names)
        if arguments.again:
            hardware = read_hardware(arguments.again).removesuffix(peaks.AGAIN) + peaks.AGAIN
            cases = list(predicted_again(folders, machine, read_cases(arguments.again)))
            print(*map(row, cases), sep="\n")
            write(cases, hardware, arguments.out)
        else:
            hardware = peaks.hardware_of(machine, dry=arguments.dry_run)
            cases = run(folders, machine, hardware, arguments)
    print(f"{time.monotonic() - started:.0f} s; {arguments.out or 'nothing written'}")
    return int(any(case.wrong for case in cases))


if __name__ == "__main__":
    sys.exit(main())
