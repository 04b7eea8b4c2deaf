"""Time and peak memory of reading one layer: early exit, a hook with the whole forward, and
``output_hidden_states``, on one loaded model in one run.

``python benchmarks/probe_early_exit.py OUT.json [--model NAME] [--tokens 2048]``.
Memory is the peak above what was allocated before the forward, on each GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pytest_multigpu.model.loaded import release
from pytest_multigpu.model.loading import load_model
from pytest_multigpu.probes.capture import capture, forward
from pytest_multigpu.records.probe import default_layer


def measure(run: Callable[[], Any], gpus: tuple[int, ...], repeats: int) -> dict[str, Any]:
    """Median seconds over ``repeats``, and each GPU's peak above its start in bytes."""
    seconds, peaks = [], {f"cuda:{gpu}": 0 for gpu in gpus}
    run()
    for _ in range(repeats):
        before = {}
        for gpu in gpus:
            torch.cuda.synchronize(gpu)
            torch.cuda.reset_peak_memory_stats(gpu)
            before[gpu] = torch.cuda.memory_allocated(gpu)
        start = time.perf_counter()
        kept = run()
        for gpu in gpus:
            torch.cuda.synchronize(gpu)
        seconds.append(time.perf_counter() - start)
        del kept
        for gpu in gpus:
            peak = torch.cuda.max_memory_allocated(gpu) - before[gpu]
            peaks[f"cuda:{gpu}"] = max(peaks[f"cuda:{gpu}"], peak)
    return {"seconds": statistics.median(seconds), "all_seconds": seconds, "peak_bytes": peaks}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="llama-3.3-70b")
    parser.add_argument("--tier", default="16bit")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device-map", default="auto", choices=["auto", "one", "cpu"])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    placed = {"one": {"": 0}, "cpu": {"": "cpu"}}.get(options.device_map, "auto")
    loaded = load_model(options.model, tier=options.tier, dtype=options.dtype, device_map=placed)
    try:
        model, gpus = loaded.model, loaded.cuda_devices
        layer = default_layer(loaded.architecture.layers)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, 256, (1, options.tokens), generator=generator)
        ways: dict[str, Callable[[], Any]] = {
            "full forward": lambda: forward(model, ids),
            "hook, full forward": lambda: capture(model, ids, (layer,), early_exit=False),
            "hook, early exit": lambda: capture(model, ids, (layer,)),
            "output_hidden_states": lambda: forward(model, ids, output_hidden_states=True),
        }
        found = {name: measure(run, gpus, options.repeats) for name, run in ways.items()}
    finally:
        release(loaded)
    full = found["full forward"]["seconds"]
    content = {
        "model": options.model,
        "tier": options.tier,
        "layer": layer,
        "tokens": options.tokens,
        "torch": torch.__version__,
        "gpus": [torch.cuda.get_device_name(gpu) for gpu in gpus],
        "ways": found,
        "early_exit_over_full": found["hook, early exit"]["seconds"] / full,
    }
    options.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for name, values in found.items():
        peak = max(values["peak_bytes"].values(), default=0)
        print(f"{name:<22} {values['seconds']:8.3f} s  {values['seconds'] / full:5.2f}  ", end="")
        print(f"peak {peak / 2**20:.0f} MiB above the start")


if __name__ == "__main__":
    main()
