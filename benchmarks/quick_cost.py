"""Print what a quick run does on this machine, what each part catches, and what it costs in ms.

``python benchmarks/quick_cost.py`` runs ``pytest -m quick`` four times, the first to fill its
caches, and prints two Markdown tables of medians for the README: the parts of the run itself, and
the steps of the CUDA worker beside it. ``--runs N``; what follows ``--`` goes to pytest.

This file is also the plugin (``-p quick_cost``) that times the parts where they happen: each its
own time, without that of the parts within it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import pytest

OUT = "QUICK_COST_OUT"
"""Environment variable: the file that the plugin writes."""
WAITING, JUDGING, HEALTH = "waiting for the CUDA worker", "judging the worker", "health by NVML"

PARTS = {
    "inventory by NVML": "GPUs that are lost or cannot be read; NVML missing or hung",
    "test_gpus": "mixed models; variables that hide GPUs; fewer than the pod was promised",
    "plan": "a model that does not fit, or spills to the CPU",
    "test_the_model_fits": "which GPU lacks how much",
    "test_room_for_the_context": "a context that is longer than what fits",
    "test_free_vram": "memory that others hold, and who",
    "checkpoint": "shards missing, truncated, padded, contradicting themselves or their index",
    "disk": "no room for what has to be downloaded",
    "read speed": "storage from which loading takes for ever",
    "test_checkpoint_and_disk": "the rest of that check: a checkpoint looked up in the hub's cache",
    "test_host_memory": "main memory under the cgroup's limit; a small /dev/shm",
    "test_driver": "a driver too old for this torch; an architecture it has no kernels for",
    "test_visibility": "GPUs that NVML lists and CUDA does not see, or numbers otherwise",
    "test_health": "ECC errors, rows to remap, throttling, narrow PCIe, NVLinks down, MIG",
    JUDGING: "what the worker's steps below catch",
}
"""By name: a function in ``_WRAPPED``, or a check without the parts within it."""
_JUDGES = (
    "test_cuda_worker",
    "test_copies",
    "test_chained_copies",
    "test_copy_bandwidth",
    "test_arithmetic",
    "test_speed_under_load",
)
_WRAPPED = {
    "inventory by NVML": [("machine.nvml", "read_machine")],
    "checkpoint": [("machine.checkpoint", "check_checkpoint")],
    "disk": [("machine.host", "read_disk")],
    "read speed": [("machine.host", "sample_read_speed")],
}
STEPS = {
    "import torch": "a torch that does not import",
    "CUDA start": "a driver too old for this torch; GPUs hidden from CUDA",
    "contexts": "a GPU that hangs or cannot make a context",
    "devices": "an order or number of GPUs other than NVML's; a GPU short of memory",
    "host buffer": "pinned memory that cannot be had",
    "uploads": "bytes changed between host and GPU",
    "copies": "pairs that deliver zeros, stale or wrong bytes",
    "chains": "copies that go wrong only in chains without synchronisation",
    "arithmetic": "a GPU that computes other bits than its siblings, or wrong numbers",
    "load": "a GPU slower than its siblings under load (clocks, heat, power)",
    "memory speed": "memory slower than the siblings' or than the datasheet allows",
    "host speed": "a PCIe link at reduced width or generation",
    "pair speed": "a pair much slower than the others with the same link",
}


# In the run: the plugin.


class Clock:
    """Seconds of each part's own, by name; parts may lie within each other. One thread."""

    def __init__(self) -> None:
        self.own: dict[str, float] = {}
        self._within: list[float] = []
        """For each open part: seconds that belong to parts within it."""

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        self._within.append(0.0)
        try:
            yield
        finally:
            took = time.perf_counter() - began
            self.own[name] = self.own.get(name, 0.0) + took - self._within.pop()
            if self._within:
                self._within[-1] += took

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def timed(*arguments: Any, **options: Any) -> Any:
            with self.part(name):
                return function(*arguments, **options)

        return timed


class Timing:
    """The plugin object: wraps before anything is collected, writes when all is over."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._clock = Clock()
        self._beside = Clock()
        """Of the thread that samples health."""
        self._worker: Any = None
        for name, functions in _WRAPPED.items():
            for module, attribute in functions:
                self._wrap(import_module(f"pytest_multigpu.{module}"), attribute, name)
        health = import_module("pytest_multigpu.machine.health")
        health._read_one = self._beside.wrap(HEALTH, health._read_one)  # type: ignore[attr-defined]
        book = import_module("pytest_multigpu.planbook").PlanBook
        book.chosen = property(self._clock.wrap("plan", book.chosen.fget))
        session = import_module("pytest_multigpu.session").GpuSession
        session.worker_report = self._clock.wrap(WAITING, self._kept(session.worker_report))

    def _wrap(self, module: Any, attribute: str, name: str) -> None:
        function = getattr(module, attribute)
        timed = self._clock.wrap(name, function)
        timed.__kwdefaults__ = function.__kwdefaults__  # type: ignore[attr-defined]
        setattr(module, attribute, timed)

    def _kept(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def keep(session: Any) -> Any:
            self._worker = function(session)
            return self._worker

        return keep

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_pyfunc_call(self, pyfuncitem: pytest.Function) -> Iterator[None]:
        name = pyfuncitem.name
        with self._clock.part(JUDGING if name in _JUDGES else name):
            return (yield)

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(self) -> None:
        worker = self._worker
        found: dict[str, Any] = {"parts": self._clock.own, "beside": self._beside.own}
        if worker is not None:
            found["worker"] = {
                "failure": worker.failure,
                "gpus": [device.name for device in worker.devices],
                "torch": worker.versions.torch if worker.versions else None,
                "seconds": worker.seconds,
                "steps": {step.name: step.seconds for step in worker.steps},
            }
        self._out.write_text(json.dumps(found))


def pytest_configure(config: pytest.Config) -> None:
    if OUT in os.environ:
        config.pluginmanager.register(Timing(Path(os.environ[OUT])), "quick-cost")


# Outside: several runs and the tables.


@dataclass(frozen=True, kw_only=True)
class Run:
    """One quick run: seconds from start to end, and where they went."""

    seconds: float
    line: str
    parts: dict[str, float]
    beside: dict[str, float]
    worker: dict[str, Any] | None


def quick(arguments: Sequence[str]) -> Run:
    """:raises RuntimeError: the run ended before it could tell its times."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "times.json")
        here = str(Path(__file__).resolve().parent)
        paths = [here, *filter(None, [os.environ.get("PYTHONPATH")])]
        environ = {**os.environ, OUT: str(out), "PYTHONPATH": os.pathsep.join(paths)}
        command = [sys.executable, "-m", "pytest", "--pyargs", "pytest_multigpu.checks"]
        command += ["-m", "quick", "-q", "-p", "no:cacheprovider", "-p", "quick_cost", *arguments]
        began = time.monotonic()
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
        seconds = time.monotonic() - began
        lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines()
        if not out.exists():
            raise RuntimeError("\n".join(lines[-20:]) or f"pytest ended with {done.returncode}")
        return Run(
            seconds=seconds, line=lines[-1], **{"worker": None, **json.loads(out.read_text())}
        )


def part_table(runs: Sequence[Run]) -> str:
    """Markdown: the parts of the run itself, one after the other, and the whole."""
    rows = ["| part | ms | catches |", "|---|---|---|"]
    known = {name for run in runs for name in run.parts} - {WAITING}
    rest = [run.seconds - sum(run.parts.values()) for run in runs]
    for name in [*PARTS, *sorted(known - set(PARTS))]:
        if name in known:
            times = [run.parts.get(name, 0.0) for run in runs]
            rows.append(f"| {_shown(name)} | {_ms(times)} | {PARTS.get(name, '')} |")
    rows.append(f"| {WAITING} | {_ms([run.parts.get(WAITING, 0.0) for run in runs])} | |")
    rows.append(f"| pytest: start, collection, tables, end | {_ms(rest)} | |")
    rows.append(f"| in all | {_ms([run.seconds for run in runs])} | |")
    return "\n".join(rows)


def step_table(runs: Sequence[Run]) -> str:
    """Markdown: the steps of the CUDA worker, and the whole of its process."""
    rows = ["| step of the CUDA worker | ms | catches |", "|---|---|---|"]
    workers = [run.worker for run in runs if run.worker is not None]
    for name, catches in STEPS.items():
        times = [worker["steps"].get(name) or 0.0 for worker in workers]
        rows.append(f"| {name} | {_ms(times)} | {catches} |")
    rest = [one["seconds"] - sum(filter(None, one["steps"].values())) for one in workers]
    rows.append(f"| start of its process and its end | {_ms(rest)} | |")
    rows.append(f"| in all | {_ms([worker['seconds'] for worker in workers])} | |")
    return "\n".join(rows)


def _shown(name: str) -> str:
    return name.removeprefix("test_").replace("_", " ")


def _ms(seconds: Sequence[float]) -> str:
    milliseconds = 1000 * median(seconds)
    return f"{milliseconds:.1f}" if milliseconds < 10 else f"{milliseconds:.0f}"


def main(argv: Sequence[str] | None = None) -> int:
    """1 if a run's worker failed or measured nothing: the tables would not be of a whole run."""
    parser = argparse.ArgumentParser(
        description="what a quick run does here, what each part catches and costs"
    )
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("pytest", nargs="*", metavar="-- ARGUMENT", help="more for pytest")
    options = parser.parse_args(argv)
    quick(options.pytest)  # the plan is known from an earlier run, files are in the page cache
    runs = [quick(options.pytest) for _ in range(options.runs)]
    last = runs[-1]
    problem = next((_problem(run) for run in runs if _problem(run)), "")
    if problem or last.worker is None:
        sys.stderr.write(f"{problem}\n{last.line}\n")
        return 1
    names = last.worker["gpus"]
    cards = " + ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    health = _ms([run.beside.get(HEALTH, 0.0) for run in runs])
    sys.stdout.write(
        f"{cards}; torch {last.worker['torch']}; median of {len(runs)} runs\n{last.line}\n\n"
        f"{part_table(runs)}\n\n{step_table(runs)}\n\n"
        f"A full reading of health by NVML takes {health} ms of a thread beside both.\n"
    )
    return 0


def _problem(run: Run) -> str:
    """Why a run's times are not those of a whole quick run; empty if they are."""
    if run.worker is None:
        return "no check asked for the CUDA worker"
    if run.worker["failure"] is not None:
        return str(run.worker["failure"])
    missing = [name for name in STEPS if run.worker["steps"].get(name) is None]
    return f"the CUDA worker took no step {missing[0]!r}" if missing else ""


if __name__ == "__main__":
    sys.exit(main())
