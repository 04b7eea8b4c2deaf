"""Quick runs in a row, and one beside a bare process that imports torch and touches each GPU.

    python benchmarks/quick_runs.py --runs 20 --pairs 5 --out FILE.json

Prints: how many of the runs were READY and the spread of every measured speed, from which the
thresholds are set; the median ratio of a quick run to the bare process, in alternating pairs; what
the NVML part adds to an empty run; free VRAM before and after; and whether the run's own process
ever showed among the compute processes. Exit 1 if any run was not READY, or the process showed.
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
from collections import defaultdict
from pathlib import Path

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
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    quick()  # the plan is known from an earlier run; caches are warm on both sides
    bare()
    before = [gpu.free_bytes for gpu in read_machine(os.environ).gpus]
    pairs = [(quick()[0], bare()) for _ in range(options.pairs)]
    runs = [quick() for _ in range(options.runs)]
    after = [gpu.free_bytes for gpu in read_machine(os.environ).gpus]
    empty, with_nvml = empty_runs(options.pairs)
    ready = sum(line.startswith("READY") for _, line, _, _ in runs)
    shown = any(seen for _, _, _, seen in runs)
    speeds: dict[str, list[float]] = defaultdict(list)
    for _, _, found, _ in runs:
        for name, value in found:
            speeds[name].append(value)
    ratio = statistics.median(mine / other for mine, other in pairs)
    result = {
        "gpus": [gpu.name for gpu in read_machine(os.environ).visible_gpus],
        "ready": ready,
        "runs": len(runs),
        "seconds": [seconds for seconds, *_ in runs],
        "pairs_seconds": pairs,
        "median_ratio": ratio,
        "nvml_adds_seconds": with_nvml - empty,
        "free_bytes_before": before,
        "free_bytes_after": after,
        "parent_among_compute_processes": shown,
        "speeds": {
            name: {"min": min(values), "median": statistics.median(values), "max": max(values)}
            for name, values in sorted(speeds.items())
        },
        "not_ready": [line for _, line, _, _ in runs if not line.startswith("READY")],
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{ready} of {len(runs)} READY; quick / bare: {ratio:.2f} (median of {len(pairs)} pairs)")
    print(f"  quick {statistics.median(p[0] for p in pairs):.2f} s", end=", ")
    print(f"bare {statistics.median(p[1] for p in pairs):.2f} s")
    print(f"NVML adds {with_nvml - empty:.2f} s to an empty run of {empty:.2f} s")
    print(f"free VRAM the same before and after: {before == after}")
    print(f"this process among the compute processes: {shown}")
    for name, values in sorted(speeds.items()):
        low, middle, high = min(values), statistics.median(values), max(values)
        print(f"  {name}: {low:.1f} to {high:.1f}, median {middle:.1f}")
    return 0 if ready == len(runs) and not shown else 1


def quick() -> tuple[float, str, list[tuple[str, float]], bool]:
    """Seconds, last line, every measured speed, and whether the process had a CUDA context."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        process = subprocess.Popen(
            [*QUICK, f"--gpu-report={folder}"], stdout=subprocess.PIPE, text=True
        )
        watch = Watch(process.pid)
        output, _ = process.communicate()
        seconds = time.monotonic() - began
        report = json.loads(Path(folder, "report.json").read_text())
    speeds = [
        (f"{check['name']} {check['device']}".strip(), float(check["measured"]))
        for check in report["checks"]
        if check["unit"] in SPEEDS and isinstance(check["measured"], int | float)
    ]
    return seconds, output.strip().splitlines()[-1], speeds, watch.stop()


class Watch:
    """Looks for one process among the compute processes of every GPU, ten times a second."""

    def __init__(self, pid: int) -> None:
        self._pid, self._seen, self._end = pid, False, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> bool:
        self._end.set()
        self._thread.join()
        return self._seen

    def _run(self) -> None:
        nvml = open_nvml()
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        while not self._end.wait(0.1):
            for handle in handles:
                processes = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
                self._seen |= any(process.pid == self._pid for process in processes)


def bare() -> float:
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", BARE], check=True)
    return time.monotonic() - began


def empty_runs(times: int) -> tuple[float, float]:
    """Median seconds of a run of one empty test, and of one that also reads the machine."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "test_empty.py").write_text("def test_empty(): pass\n")
        Path(folder, "test_nvml.py").write_text("def test_nvml(gpu_inventory): pass\n")
        medians = []
        found: dict[str, list[float]] = {"test_empty.py": [], "test_nvml.py": []}
        for _ in range(times):
            for name, values in found.items():
                began = time.monotonic()
                subprocess.run(
                    [sys.executable, "-m", "pytest", "-q", name],
                    cwd=folder,
                    stdout=subprocess.DEVNULL,
                    check=True,
                )
                values.append(time.monotonic() - began)
        medians = [statistics.median(values) for values in found.values()]
    return medians[0], medians[1]


if __name__ == "__main__":
    sys.exit(main())
