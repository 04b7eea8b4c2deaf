"""Wall time of whole runs beside the bare imports that they cannot do without.

    python benchmarks/suite_time.py --tiers 16bit 8bit 4bit --rounds 3 --out FILE.json

In each round, in turn: a bare process that imports transformers' Llama and makes a context on every
GPU, then the whole suite with a synthesised model in each tier. Prints seconds, the ratio to the
bare process, and where the time went, check by check. ``--keep`` has every run write its report,
which takes a moment of its own. Exit 1 if a run was not READY.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from _common import ALONE, NO_OTHERS

from pytest_multigpu.machine.nvml import read_machine

BARE = (
    "from transformers import AutoModelForCausalLM\n"
    "from transformers.models.llama import LlamaForCausalLM\n"
    "import torch\n"
    "for i in range(torch.cuda.device_count()):\n"
    "    torch.ones(1, device=f'cuda:{i}').add_(1)\n"
    "    torch.cuda.synchronize(i)\n"
)
CHECKS = (sys.executable, "-m", "pytest", "--pyargs", "pytest_multigpu.checks", "-q", *ALONE)
MOST = 8
"""Checks named in the summary, the longest first."""


def main() -> int:
    parser = argparse.ArgumentParser(description="wall time of whole runs, beside bare imports")
    parser.add_argument("--tiers", nargs="+", default=["16bit", "8bit", "4bit"])
    parser.add_argument("--placement", default="auto")
    parser.add_argument("--model", default="llama-3.3-70b")
    parser.add_argument("--weights", default="synthetic")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="a folder for every run's report.json")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    asked = (
        f"--gpu-placement={options.placement}",
        f"--gpu-model={options.model}",
        f"--gpu-weights={options.weights}",
    )
    result: dict[str, Any] = {
        "gpus": [gpu.name for gpu in read_machine(os.environ).visible_gpus],
        "cpu_count": os.cpu_count(),
        "options": list(asked),
        "bare_seconds": [],
        "runs": {tier: [] for tier in options.tiers},
    }
    for number in range(1, options.rounds + 1):
        result["bare_seconds"].append(timed([sys.executable, "-c", BARE])[0])
        print(f"bare {result['bare_seconds'][-1]:.1f} s", flush=True)
        for tier in options.tiers:
            kept = options.keep and options.keep / f"{tier}-{number}.json"
            result["runs"][tier].append(whole_run(f"--gpu-tier={tier}", *asked, keep=kept))
            print(f"{tier} {result['runs'][tier][-1]['seconds']:.1f} s", flush=True)
            options.out.write_text(json.dumps(result, indent=1) + "\n")
    bare = statistics.median(result["bare_seconds"])
    for tier, runs in result["runs"].items():
        middle = sorted(runs, key=lambda run: run["seconds"])[len(runs) // 2]
        print(f"{tier}: {middle['seconds']:.1f} s, {middle['seconds'] / bare:.2f} times the bare")
        print(f"  {middle['line']}")
        for name, seconds in list(middle["checks"].items())[:MOST]:
            print(f"  {seconds:6.2f} s  {name}")
    ready = [run["line"].startswith("READY") for runs in result["runs"].values() for run in runs]
    return 0 if all(ready) else 1


def whole_run(*arguments: str, keep: Path | None) -> dict[str, Any]:
    """Seconds in all and of each check, set-up included, the longest first; and the verdict.

    :param keep: where its report.json goes.
    """
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder, "junit.xml")
        wanted = (f"--junitxml={xml}", *(() if keep is None else (f"--gpu-report={folder}",)))
        seconds, output = timed([*CHECKS, *arguments, *wanted])
        if keep is not None:
            keep.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(folder, "report.json"), keep)
        cases = ET.parse(xml).getroot().iter("testcase")  # noqa: S314 - our own file
        checks = {str(case.get("name")): float(case.get("time") or 0) for case in cases}
    lines = output.strip().splitlines()
    return {
        "seconds": seconds,
        "line": lines[-1] if lines else "",
        "checks": dict(sorted(checks.items(), key=lambda row: -row[1])),
    }


def timed(command: list[str]) -> tuple[float, str]:
    began = time.monotonic()
    environ = {**os.environ, **NO_OTHERS}
    done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, check=False)
    return time.monotonic() - began, done.stdout


if __name__ == "__main__":
    sys.exit(main())
