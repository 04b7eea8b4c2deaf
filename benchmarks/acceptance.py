"""The main job on this machine's real GPUs, and the refusals that must come for their true reason.

    python benchmarks/acceptance.py --out results

Runs the shipped checks with the synthetic 70B in each tier that fits, the quick checks, a small
checkpoint written to disk, and what must be NOT READY: a named tier on one GPU that is too small
for it, a device map that puts layers on the CPU, another process holding most of a GPU, a
truncated shard. Keeps each run's report as ``<out>/<hardware>-<name>.json``, the scores of all
tiers as ``<out>/<hardware>-drift.json``, and prints a table.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from _common import held_by_another

from pytest_multigpu.machine.nvml import read_machine
from pytest_multigpu.records.machine import Machine

CHECKS = (sys.executable, "-m", "pytest", "--pyargs", "pytest_multigpu.checks")
AUTO_SHARE = {"16bit": 0.9, "8bit": 0.81, "4bit": 0.81}
"""Of a lone GPU, what transformers' planner and bitsandbytes let ``auto`` use."""
HOG = """
import sys, torch
held = torch.empty(int(sys.argv[2]), dtype=torch.uint8, device=f"cuda:{sys.argv[1]}")
torch.cuda.synchronize()
print("holding", flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    name: str
    args: tuple[str, ...]
    exit_code: int
    line: str
    """What the last line must match."""
    environ: dict[str, str] = field(default_factory=dict)
    before: Callable[[], None] | None = None
    during: Callable[[], object] | None = None
    """A context manager that holds while it runs."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--only", help="a regular expression on the names")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    machine = read_machine(os.environ)
    if not machine.visible:
        print(f"no GPU to run on: {machine.problem or 'none found'}")
        return 1
    label = hardware(machine)
    with tempfile.TemporaryDirectory() as folder:
        good = [
            run(one, label, options.out)
            for one in all_scenarios(machine, Path(folder))
            if options.only is None or re.search(options.only, one.name)
        ]
    print(f"{sum(good)} of {len(good)} as expected on {label}")
    return 0 if all(good) else 1


def hardware(machine: Machine) -> str:
    """``h200x2``: what result files are named after."""
    names = [
        re.sub(r"nvidia|geforce|\W|(80|40)gb|hbm3", "", gpu.name.casefold())
        for gpu in machine.visible_gpus
    ]
    return "+".join(f"{name}x{names.count(name)}" for name in dict.fromkeys(names))


def all_scenarios(machine: Machine, folder: Path) -> Iterator[Scenario]:
    gpus = len(machine.visible)
    total = sum(gpu.free_bytes for gpu in machine.visible_gpus)
    best: tuple[str, ...] = ()
    for tier, weights in (("16bit", 141e9), ("8bit", 73e9), ("4bit", 43e9)):
        if total > weights * 1.05:
            refused = gpus == 1 and weights > total * AUTO_SHARE[tier]
            placement = ("--gpu-placement=balanced",) if refused else ()
            best = best or (f"--gpu-tier={tier}", *placement)
            yield Scenario(
                name=tier,
                args=(f"--gpu-tier={tier}", *placement),
                exit_code=0,
                line=f"^READY: llama-3.3-70b in {tier} on {gpus} x",
            )
            if placement:
                yield Scenario(
                    name=f"{tier}-auto",
                    args=(f"--gpu-tier={tier}", "-m", "quick"),
                    exit_code=1,
                    line=r"^NOT READY: .*(refuses|would go to the CPU).*--gpu-placement=balanced",
                )
    if gpus > 1 and machine.visible_gpus[0].free_bytes > 145e9:
        yield Scenario(
            name="one-gpu-16bit-balanced",
            args=("--gpu-tier=16bit", "--gpu-placement=balanced"),
            environ={"CUDA_VISIBLE_DEVICES": "0"},
            exit_code=0,
            line="^READY: llama-3.3-70b in 16bit on 1 x",
        )
    yield Scenario(name="quick", args=("-m", "quick"), exit_code=0, line="^READY: ")
    yield Scenario(
        name="one-gpu-16bit",
        args=("--gpu-tier=16bit", "-m", "quick"),
        environ={"CUDA_VISIBLE_DEVICES": "0"},
        # A card that could hold it all, if auto would let it, needs no other machine.
        exit_code=1 if machine.visible_gpus[0].free_bytes > 145e9 else 10,
        line=r"^NOT READY: \d+ blocks would go to the CPU: model\.layers\.\d+, .*(rent|balanced)",
    )
    cpu_map = folder / "cpu_layers.json"
    layers = {f"model.layers.{index}": 0 if index < 78 else "cpu" for index in range(80)}
    ends = {"model.embed_tokens": 0, "model.norm": 0, "model.rotary_emb": 0, "lm_head": 0}
    cpu_map.write_text(json.dumps(ends | layers))
    yield Scenario(
        name="cpu-layers",
        args=("--gpu-tier=4bit", f"--gpu-placement={cpu_map}", "-m", "quick"),
        exit_code=1,
        line=r"^NOT READY: .*model\.layers\.78.*model\.layers\.79",
    )
    hogged = gpus - 1
    held = int(machine.visible_gpus[hogged].free_bytes * 0.9)
    yield Scenario(
        name="held-gpu",
        args=(*best, "-m", "quick", "--gpu-wait=1"),
        exit_code=1,
        line=rf"^NOT READY: GPU {hogged} .* GiB free; found .* GiB .*held by",
        during=lambda: held_by_another(HOG, hogged, held),
    )
    whole, cut = folder / "whole", folder / "cut"
    yield Scenario(
        name="checkpoint",
        args=("--gpu-tier=16bit", f"--gpu-model={whole}"),
        exit_code=0,
        line="^READY: ",
        before=lambda: write_checkpoint(whole),
    )
    yield Scenario(
        name="truncated-shard",
        args=("--gpu-tier=16bit", f"--gpu-model={cut}", "-k", "checkpoint or distribution"),
        exit_code=1,
        line=r"^NOT READY: .*model-00002-of-\d+\.safetensors is truncated",
        before=lambda: truncate_copy(whole, cut),
    )


def truncate_copy(whole: Path, cut: Path) -> None:
    """The checkpoint with its second shard cut short."""
    if not whole.exists():
        write_checkpoint(whole)
    shutil.copytree(whole, cut)
    shard = sorted(cut.glob("*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 1000)


def write_checkpoint(folder: Path) -> None:
    """A Llama of 0.5 billion parameters in a dozen shards, with a tokenizer, as the hub has them.

    In a process of its own: this one must not import torch.
    """
    script = (
        "import sys\n"
        "from pytest_multigpu.model.loading import load_model\n"
        "loaded = load_model('llama-3.2-1b', tier='16bit', device_map={'': 0},"
        " weights='synthetic')\n"
        "loaded.model.save_pretrained(sys.argv[1], max_shard_size='300MB')\n"
        "loaded.tokenizer.save_pretrained(sys.argv[1])\n"
    )
    subprocess.run([sys.executable, "-c", script, str(folder)], check=True)


def run(scenario: Scenario, label: str, out: Path) -> bool:
    with tempfile.TemporaryDirectory() as report, ExitStack() as stack:
        if scenario.before is not None:
            scenario.before()
        if scenario.during is not None:
            stack.enter_context(scenario.during())  # type: ignore[arg-type]
        # One text set in every tier: each compares with those before it.
        drift, its = out / f"{label}-drift.json", Path(report, "drift.json")
        if scenario.name in AUTO_SHARE and drift.is_file():
            shutil.copy(drift, its)
        began = time.monotonic()
        done = subprocess.run(
            [*CHECKS, *scenario.args, f"--gpu-report={report}"],
            env=os.environ | scenario.environ,
            capture_output=True,
            text=True,
            check=False,
        )
        seconds = time.monotonic() - began
        last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-300:]
        kept = out / f"{label}-{scenario.name}.json"
        if Path(report, "report.json").is_file():
            shutil.copy(Path(report, "report.json"), kept)
        if scenario.name in AUTO_SHARE and its.is_file():
            shutil.copy(its, drift)
        good = done.returncode == scenario.exit_code and re.search(scenario.line, last) is not None
        print(
            f"{'ok    ' if good else 'NOT OK'} {scenario.name}: exit {done.returncode} "
            f"(expected {scenario.exit_code}) in {seconds:.1f} s: {last}",
            flush=True,
        )
        if not good:
            Path(out, f"{label}-{scenario.name}.log").write_text(done.stdout + done.stderr)
    return good


if __name__ == "__main__":
    sys.exit(main())
