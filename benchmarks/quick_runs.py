"""Quick runs in a row, and one beside a bare process that imports torch and touches each GPU.

    python benchmarks/quick_runs.py --runs 20 --pairs 5 --out FILE.json

Prints: how many of the runs were READY and the spread of every measured speed, from which the
thresholds are set; the median ratio of a quick run to the bare process, in alternating rounds;
what an empty run takes, and what the NVML part adds to it; free VRAM before and after; and whether
the run's own process ever showed among the compute processes. Exit 1 if any run was not READY, or
the process showed. No plugins but ours and pytest-timeout are loaded; ``--installed`` adds to each
round a run with every pytest plugin that is installed here.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from _common import ALONE, NO_OTHERS

from pytest_multigpu.machine.nvml import open_nvml, read_machine

QUICK = (sys.executable, "-m", "pytest", "--pyargs", "pytest_multigpu.checks", "-m", "quick", "-q")
BARE = (
    "import torch\n"
    "for i in range(torch.cuda.device_count()):\n"
    "    torch.ones(1, device=f'cuda:{i}').add_(1)\n"
    "    torch.cuda.synchronize(i)\n"
)
SPEEDS = ("GB/s", "TFLOP/s")


def main() -> int:
    parser = argparse.ArgumentParser(description="quick runs in a row, and beside a bare process")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--installed", action="store_true", help="time this image's plugins too")
    parser.add_argument("--seconds", type=float, default=600, help="start no run after that")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    began = time.monotonic()
    red: list[str] = []
    timed_quick(red)  # the plan is known from an earlier run; caches are warm on both sides
    bare()
    before = [gpu.free_bytes for gpu in read_machine(os.environ).gpus]
    result: dict[str, Any] = {
        "gpus": [gpu.name for gpu in read_machine(os.environ).visible_gpus],
        "free_bytes_before": before,
        "not_ready": red,
        "rounds_seconds": [],
        "runs": [],
    }

    def keep() -> None:
        """After every step: a run that is stopped from outside leaves what it knew."""
        options.out.write_text(json.dumps(result, indent=1) + "\n")

    rounds = result["rounds_seconds"]
    for _ in range(options.pairs):
        rounds.append({"bare": bare(), "alone": timed_quick(red)})
        if options.installed:
            rounds[-1]["as installed"] = timed_quick(red, alone=False)
        keep()
        print(*(f"{name} {seconds:.2f} s" for name, seconds in rounds[-1].items()), flush=True)
    for name in [name for name in rounds[0] if name != "bare"] if rounds else ():
        ratio = statistics.median(each[name] / each["bare"] for each in rounds)
        result[f"median_ratio_{name.replace(' ', '_')}"] = ratio
        print(f"quick ({name}) / bare: {ratio:.2f}, median of {len(rounds)} rounds")
    empty, with_nvml = empty_runs(max(1, options.pairs))
    result["empty_run_seconds"] = empty
    result["nvml_adds_seconds"] = with_nvml - empty
    print(f"NVML adds {with_nvml - empty:.2f} s to an empty run of {empty:.2f} s", flush=True)
    runs: list[Run] = []
    while len(runs) < options.runs and time.monotonic() - began < options.seconds:
        runs.append(quick())
        result["runs"].append(asdict(runs[-1]))
        result["free_bytes_after"] = [gpu.free_bytes for gpu in read_machine(os.environ).gpus]
        keep()
    return summary(result, runs)


def summary(result: dict[str, Any], runs: list[Run]) -> int:
    ready = sum(run.line.startswith("READY") for run in runs)
    shown = any(run.parent_had_a_context for run in runs)
    print(f"{ready} of {len(runs)} READY")
    same = result["free_bytes_before"] == result.get("free_bytes_after")
    print(f"free VRAM the same before and after: {same}")
    print(f"the run's own process among the compute processes: {shown}")
    for name in sorted({name for run in runs for name in run.speeds}):
        values = [run.speeds[name] for run in runs if name in run.speeds]
        low, middle, high = min(values), statistics.median(values), max(values)
        print(f"  {name}: {low:.1f} to {high:.1f}, median {middle:.1f}")
    return 0 if ready == len(runs) and not shown and not result["not_ready"] else 1


@dataclass(frozen=True)
class Run:
    """One quick run."""

    seconds: float
    line: str
    speeds: dict[str, float]
    parent_had_a_context: bool


def timed_quick(red: list[str], *, alone: bool = True) -> float:
    """Seconds of a quick run as people make it, without a report; its line if it is not READY."""
    environ = {**os.environ, **(NO_OTHERS if alone else {})}
    began = time.monotonic()
    done = subprocess.run(
        [*QUICK, *(ALONE if alone else ())],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.monotonic() - began
    if done.returncode:
        red.append("\n".join((done.stdout + done.stderr).splitlines()[-20:]))
        print(red[-1], flush=True)
    return seconds


def quick() -> Run:
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        process = subprocess.Popen(
            [*QUICK, *ALONE, f"--gpu-report={folder}"],
            env={**os.environ, **NO_OTHERS},
            stdout=subprocess.PIPE,
            text=True,
        )
        watch = Watch(process.pid)
        output, _ = process.communicate()
        seconds = time.monotonic() - began
        report = json.loads(Path(folder, "report.json").read_text())
    speeds = {
        f"{check['name']} {check['device']}".strip(): float(check["measured"])
        for check in report["checks"]
        if check["unit"] in SPEEDS and isinstance(check["measured"], int | float)
    }
    return Run(seconds, output.strip().splitlines()[-1], speeds, watch.stop())


class Watch:
    """Looks for one process among the compute processes of every GPU, ten times a second."""

    def __init__(self, pid: int) -> None:
        self._pid, self._seen, self._end = pid, False, threading.Event()
        self._error: Exception | None = None
        self._nvml = open_nvml()
        count = self._nvml.nvmlDeviceGetCount()
        self._handles = [self._nvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> bool:
        """Whether the process was ever seen; raises what kept us from looking."""
        self._end.set()
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._seen

    def _run(self) -> None:
        try:
            while not self._end.wait(0.1):
                for handle in self._handles:
                    processes = self._nvml.nvmlDeviceGetComputeRunningProcesses(handle)
                    self._seen |= any(process.pid == self._pid for process in processes)
        except Exception as error:
            self._error = error


def bare() -> float:
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", BARE], check=True)
    return time.monotonic() - began


def empty_runs(times: int) -> tuple[float, float]:
    """Median seconds of a run of one empty test, and of one that also reads the machine."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "test_empty.py").write_text("def test_empty(): pass\n")
        Path(folder, "test_nvml.py").write_text("def test_nvml(gpu_inventory): pass\n")
        found: dict[str, list[float]] = {"test_empty.py": [], "test_nvml.py": []}
        for _ in range(times):
            for name, values in found.items():
                began = time.monotonic()
                subprocess.run(
                    [sys.executable, "-m", "pytest", "-q", *ALONE, name],
                    cwd=folder,
                    env={**os.environ, **NO_OTHERS},
                    stdout=subprocess.DEVNULL,
                    check=True,
                )
                values.append(time.monotonic() - began)
        medians = [statistics.median(values) for values in found.values()]
    return medians[0], medians[1]


if __name__ == "__main__":
    sys.exit(main())
