"""What a decode step of each model family takes of Python and of the memory: planning/speed.py.

    python benchmarks/decode_cost.py --out results/decode-cost            # on one GPU
    python benchmarks/decode_cost.py --only mixtral --tiers 4bit --out FILE
    python benchmarks/decode_cost.py --again results/decode-cost.json --out FILE    # no GPU

Each model is loaded with synthesised weights at two depths; the difference of a step's time is
that of the layers between, the rest is what ``generate`` takes beside them. Beside it: what the
plan counts (kernels, Linears, bytes), and how long the GPU's kernels took by torch's profiler.
At the end how far each tier is from what ``planning/speed.py`` expects: its constants are such that
whole runs of the suite, which meter as they go, come out as measured. Written to ``OUT.json`` and
``OUT.md``.
``--again`` measures nothing: it puts the predictions of this commit beside an earlier run.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from family_configs import CONFIGS
from peak_table import read_hardware
from peaks import hardware_of

from pytest_multigpu.machine.nvml import read_machine
from pytest_multigpu.model.architecture import describe
from pytest_multigpu.model.config import ResolvedModel, resolve_config
from pytest_multigpu.planning.speed import (
    launched,
    step_bytes,
    step_seconds,
)
from pytest_multigpu.records.plan import Architecture, Tier

TIERS: tuple[Tier, ...] = ("16bit", "8bit", "4bit")
DEPTHS = (6, 12)
"""Every pattern of layers that the families have is in the first."""
PROMPT, NEW_TOKENS, REPEATS = 16, 16, 2
PROFILED = 6
"""New tokens."""


@dataclass(frozen=True, kw_only=True)
class Depth:
    layers: int
    step_seconds: float
    """The least of the medians of the generations."""
    launch_seconds: float
    kernel_seconds: float
    """Of a step, what the GPU was busy."""
    kernels: int
    linears: int
    step_bytes: int


@dataclass(frozen=True, kw_only=True)
class Case:
    model: str
    tier: Tier
    depths: tuple[Depth, ...]


def configs(only: Sequence[str]) -> Iterator[tuple[str, ResolvedModel]]:
    """Those that are deep enough."""
    found = {"llama-3.3-70b": resolve_config("llama-3.3-70b")}
    for name, config in CONFIGS.items():
        found[name.partition(",")[0]] = ResolvedModel(name=name, config_dict=config)
    for name, resolved in found.items():
        deep = int(resolved.config_dict["num_hidden_layers"]) >= DEPTHS[-1]  # type: ignore[call-overload]
        if deep and (not only or any(part in name for part in only)):
            yield name, resolved


def cut(resolved: ResolvedModel, layers: int) -> ResolvedModel:
    return ResolvedModel(
        name=resolved.name, config_dict={**resolved.config_dict, "num_hidden_layers": layers}
    )


def measured(resolved: ResolvedModel, architecture: Architecture) -> Depth:
    import torch

    from pytest_multigpu.model.generation import generate, launch_seconds
    from pytest_multigpu.model.loading import load_model

    loaded = load_model(resolved, tier=architecture.tier, device_map={"": 0}, weights="synthetic")
    launches = [launch_seconds(0)]
    prompt = list(range(3, 3 + PROMPT))
    generate(loaded, prompt, NEW_TOKENS)
    steps = [generate(loaded, prompt, NEW_TOKENS)[2].step_seconds for _ in range(REPEATS)]
    launches.append(launch_seconds(0))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        generate(loaded, prompt, PROFILED + 1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as prefill:
        generate(loaded, prompt, 1)
    del loaded
    gc.collect()
    torch.cuda.empty_cache()
    return Depth(
        layers=architecture.layers,
        step_seconds=min(step for step in steps if step),
        launch_seconds=min(launches),
        kernel_seconds=(busy_seconds(profiler) - busy_seconds(prefill)) / PROFILED,
        **counted(architecture),
    )


def counted(architecture: Architecture) -> dict[str, int]:
    """What this commit's plan counts of a step."""
    kernels, linears = launched(architecture)
    moved = sum(step_bytes(architecture, copies=True).values())
    return {"kernels": kernels, "linears": linears, "step_bytes": moved}


def busy_seconds(profiler: Any) -> float:
    return sum(event.self_device_time_total for event in profiler.key_averages()) / 1e6


def run(arguments: argparse.Namespace) -> Iterator[Case]:
    for name, resolved in configs(arguments.only):
        for tier in arguments.tiers:
            architectures = [describe(cut(resolved, layers), tier=tier) for layers in DEPTHS]
            if architectures[0].refused:
                print(f"{name} in {tier}: {architectures[0].refused[0]}", flush=True)
                continue
            depths = [
                measured(cut(resolved, architecture.layers), architecture)
                for architecture in architectures
            ]
            yield Case(model=name, tier=tier, depths=tuple(depths))


def counted_again(cases: Sequence[Case]) -> Iterator[Case]:
    for case in cases:
        depths = (replace(depth, **counted(cut_of(case, depth))) for depth in case.depths)
        yield replace(case, depths=tuple(depths))


def table(cases: Sequence[Case]) -> Iterator[str]:
    yield (
        "| model | tier | kernels | Linears | launch us | ms a layer | ms beside | "
        "expected step ms | measured | times | GPU busy ms | GB/s |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|"
    for case in cases:
        low, high = case.depths[0], case.depths[-1]
        between = high.layers - low.layers
        layer = (high.step_seconds - low.step_seconds) / between
        beside, due = low.step_seconds - layer * low.layers, expected(case, high)
        yield (
            f"| {case.model} | {case.tier} | {(high.kernels - low.kernels) / between:.1f} | "
            f"{(high.linears - low.linears) / between:.1f} | {high.launch_seconds * 1e6:.1f} | "
            f"{layer * 1e3:.3f} | {beside * 1e3:.2f} | {due * 1e3:.1f} | "
            f"{high.step_seconds * 1e3:.1f} | {high.step_seconds / due:.2f} | "
            f"{high.kernel_seconds * 1e3:.1f} | {high.step_bytes / high.kernel_seconds / 1e9:.0f} |"
        )


def summary(cases: Sequence[Case]) -> Iterator[str]:
    """How far the steps are from what ``planning/speed.py`` expects, tier by tier."""
    for tier in TIERS:
        times = sorted(
            depth.step_seconds / expected(case, depth)
            for case in cases
            if case.tier == tier
            for depth in case.depths
        )
        if times:
            tenth = len(times) // 10
            yield (
                f"{tier}: measured {median(times):.2f} times the expected at the median, "
                f"{times[tenth]:.2f} to {times[-1 - tenth]:.2f} without the outer tenths."
            )


def expected(case: Case, depth: Depth) -> float:
    """Seconds that Python should take for a step."""
    architecture = cut_of(case, depth)
    return step_seconds(architecture, 0.0, gpus=1, launch_seconds=depth.launch_seconds)


def cut_of(case: Case, depth: Depth) -> Architecture:
    return describe(cut(dict(configs(()))[case.model], depth.layers), tier=case.tier)


def write(out: Path, heading: str, cases: Sequence[Case]) -> str:
    text = "\n".join(
        (
            f"# Decode steps: {heading}",
            "",
            f"One sequence, {PROMPT} tokens of prompt. Per layer: kernels and quantised Linears as "
            "the plan counts them, and the time. The last columns: the whole step at "
            f"{DEPTHS[-1]} layers, and what the plan says that the memory moves, by the time in "
            "which the GPU was busy.",
            "",
            *table(cases),
            "",
            *summary(cases),
        )
    )
    out.with_suffix(".md").write_text(text + "\n")
    document = {"hardware": heading, "cases": [asdict(case) for case in cases]}
    out.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    return text


def read_cases(path: Path) -> list[Case]:
    return [
        Case(**{**case, "depths": tuple(Depth(**depth) for depth in case["depths"])})
        for case in json.loads(path.read_text())["cases"]
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description="what a decode step takes, by model family")
    parser.add_argument("--only", default="", help="parts of names, comma-separated")
    parser.add_argument("--tiers", default=",".join(TIERS))
    parser.add_argument("--again", type=Path, help="predict anew beside what that file measured")
    parser.add_argument("--out", type=Path, required=True, help="without .json and .md")
    arguments = parser.parse_args()
    arguments.only = [part for part in arguments.only.split(",") if part]
    arguments.tiers = arguments.tiers.split(",")
    if arguments.again:
        cases = list(counted_again(read_cases(arguments.again)))
        print(write(arguments.out, read_hardware(arguments.again), cases))
        return 0
    heading, cases = hardware_of(read_machine(os.environ), dry=False), []
    for case in run(arguments):
        cases.append(case)
        text = write(arguments.out, heading, cases)
        print(case, flush=True)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
