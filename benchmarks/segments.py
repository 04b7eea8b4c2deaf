"""Every segment that torch asks the driver for, with its address, beside the plan's peaks.

    python benchmarks/segments.py --tier 8bit --gpus 1 --sizes 2048x1 8192x1 --out FILE.json

Loads the synthetic model as ``peaks.py`` does and records torch's own allocator
(``torch.cuda.memory._record_memory_history``) for each context and batch, generated and probed
from an emptied cache. ``tests/planning/segments_h200.json`` holds the sizes of such runs in MiB;
the addresses tell in which order the driver gives them. With
``PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True`` in the environment these are the pieces by
which segments grow.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import peaks

from pytest_multigpu.machine.nvml import read_machine
from pytest_multigpu.model.architecture import describe
from pytest_multigpu.model.config import resolve_config
from pytest_multigpu.model.loaded import release
from pytest_multigpu.model.loading import load_model
from pytest_multigpu.planning.allocator import SMALL_SEGMENT
from pytest_multigpu.planning.balance import balanced
from pytest_multigpu.units import MIB

ASKED = ("segment_alloc", "segment_map")
"""The second one where segments grow."""


def main() -> int:
    parser = argparse.ArgumentParser(description="segments of torch's allocator, one by one")
    parser.add_argument("--model", default="llama-3.3-70b")
    parser.add_argument("--tier", default="8bit", choices=["4bit", "8bit", "16bit"])
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--sizes", nargs="+", default=["2048x1", "8192x1"], help="context x batch")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    machine = peaks.first_gpus(read_machine(), options.gpus)
    if len(machine.visible) < options.gpus:
        found = len(machine.visible)
        print(f"needs {options.gpus} visible GPUs; found {found}", file=sys.stderr)
        return 1
    architecture = describe(resolve_config(options.model), tier=options.tier)
    placed = balanced(architecture, machine, context_tokens=2048, batch=1)
    loaded = load_model(
        options.model,
        tier=options.tier,
        device_map=placed,
        weights="synthetic",
        architecture=architecture,
    )
    result: dict[str, Any] = {"gpus": [gpu.name for gpu in machine.visible_gpus], "cases": {}}
    try:
        peaks.generate(loaded.model, loaded.input_device, peaks.FIRST_TOKENS, 1)
        for size in options.sizes:
            context, batch = map(int, size.split("x"))
            plan = peaks.plan_of(architecture, machine, placed, context, batch)
            for phase in ("generate", "probe"):
                rows = recorded(loaded, phase, context - peaks.STEPS, batch, options.gpus)
                predicted = [peaks.predicted(device, phase) for device in plan.devices]
                result["cases"][f"{options.tier} {size} {phase}"] = {
                    "predicted_bytes": predicted,
                    "segments": rows,
                }
                options.out.write_text(json.dumps(result) + "\n")
                sums = [sum(length for _, length in row) // MIB for row in rows]
                print(f"{size} {phase}: segments of {sums} MiB", flush=True)
    finally:
        release(loaded)
    return 0


def recorded(
    loaded: Any, phase: str, prompt: int, batch: int, gpus: int
) -> list[list[tuple[int, int]]]:
    """Address and bytes of each segment above 2 MiB, GPU by GPU, in the order asked for."""
    import torch

    memory: Any = torch.cuda.memory  # partly untyped
    peaks.fresh(gpus)
    memory._record_memory_history(enabled="all", context=None, max_entries=4_000_000)
    try:
        if phase == "generate":
            peaks.generate(loaded.model, loaded.input_device, prompt, batch)
        else:
            peaks.probe(loaded, prompt, batch)
        for index in range(gpus):
            torch.cuda.synchronize(index)
        traces = memory._snapshot()["device_traces"][:gpus]
    finally:
        memory._record_memory_history(enabled=None)
    return [
        [
            (int(event["addr"]), int(event["size"]))
            for event in trace
            if event["action"] in ASKED and event["size"] > SMALL_SEGMENT
        ]
        for trace in traces
    ]


if __name__ == "__main__":
    raise SystemExit(main())
