"""The largest context that the plan promises, run for real; 5% more, refused by the plan.

    python benchmarks/largest_context.py --tier 4bit --placement balanced --out FILE.json

Loads the synthetic 70B as planned, prefills and decodes up to the predicted largest context, and
compares the peaks with the cards. Plans for 5% more as well: the plan must refuse and name the GPU
and what it lacks. Prints the largest context under ``auto`` beside it, and what ``auto`` lacks for
the context that was run. With ``--free 79.18`` another process holds memory until that many GiB are
free on each GPU, so that larger cards stand in for 80 GB ones.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

from _common import held_by_another
from peaks import STEPS, UsedMemory, generate

from pytest_multigpu.beside_plan import longest_contexts
from pytest_multigpu.machine.nvml import read_machine
from pytest_multigpu.options import Settings
from pytest_multigpu.planbook import PlanBook
from pytest_multigpu.records.plan import Plan
from pytest_multigpu.units import GIB

HOLD = """
import sys, torch
held = []
for gpu in range(torch.cuda.device_count()):
    torch.zeros(1, device=f"cuda:{gpu}")
    free, _ = torch.cuda.mem_get_info(gpu)
    over = max(0, free - int(sys.argv[1]))
    held.append(torch.empty(over, dtype=torch.uint8, device=f"cuda:{gpu}"))
    torch.cuda.synchronize(gpu)
print("holding", flush=True)
sys.stdin.read()
"""


def main() -> int:
    parser = argparse.ArgumentParser(description="the largest context that fits, run for real")
    parser.add_argument("--tier", default="4bit", choices=["4bit", "8bit", "16bit"])
    parser.add_argument("--placement", default="balanced", choices=["auto", "balanced"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--at-most", type=int, default=10**9, help="tokens; for the run's time")
    parser.add_argument("--free", type=float, metavar="GIB", help="hold what is free beyond this")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if options.free is None:
        return measure(options)
    with held_by_another(HOLD, round(options.free * GIB)):
        return measure(options)


def measure(options: argparse.Namespace) -> int:
    machine = read_machine(os.environ)
    settings = Settings(tier=options.tier, placement=options.placement, batch=options.batch)

    def planned(tokens: int, placement: str) -> Plan:
        asked = replace(settings, context=tokens, placement=placement)
        return PlanBook(asked, machine, os.environ).chosen

    # What --gpu-plan -v prints.
    largest = {
        one.placement: one.tokens
        for one in longest_contexts(PlanBook(settings, machine, os.environ), [options.tier])
        if not one.expandable_segments
    }
    tokens = min(largest[options.placement], options.at_most)
    beyond = planned(int(largest[options.placement] * 1.05) + 1, options.placement)
    plan = planned(tokens, options.placement)
    print(
        f"largest context: {largest}; running {tokens} tokens x {options.batch}, "
        f"placement {options.placement}",
        flush=True,
    )
    print(f"5% more: {'fits' if beyond.fits else beyond.reasons[0]}")
    result = {
        "tier": options.tier,
        "placement": options.placement,
        "gpus": [gpu.name for gpu in machine.visible_gpus],
        "free_bytes": [gpu.free_bytes for gpu in machine.visible_gpus],
        "largest_tokens": largest,
        "ran_tokens": tokens,
        "batch": options.batch,
        "five_percent_more": list(beyond.reasons),
        "auto_says": list(planned(tokens, "auto").reasons),
        "layers": {device.device: device.layers for device in plan.devices},
        **run(plan, UsedMemory(machine)),
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    return (
        0 if not beyond.fits or beyond.context_tokens > (plan.architecture.max_context or 0) else 1
    )


def run(plan: Plan, used: UsedMemory) -> dict[str, object]:
    """Load as planned and fill the whole context; the most in use beside the plan's peaks."""
    from pytest_multigpu.model.loading import load_model

    architecture = plan.architecture
    devices = [d.device for d in plan.devices if d.device.startswith("cuda:")]
    others = used.now()
    with used.peak() as found:
        loaded = load_model(
            architecture.model, tier=architecture.tier, device_map=plan.device_map, plan=plan,
            weights="synthetic",
        )  # fmt: skip
        began = time.monotonic()
        generate(loaded.model, loaded.input_device, plan.context_tokens - STEPS, plan.batch)
    ours = [most - before for most, before in zip(found, others, strict=True)]
    peaks = {device: ours[int(device.removeprefix("cuda:"))] for device in devices}
    for row in plan.devices:
        if row.device in peaks:
            print(
                f"{row.device}: predicted {row.peak_bytes}, measured {peaks[row.device]}, "
                f"of {row.limit_bytes}"
            )
    return {
        "seconds": time.monotonic() - began,
        "predicted_bytes": {d.device: d.peak_bytes for d in plan.devices},
        "measured_bytes": peaks,
        "limit_bytes": {d.device: d.limit_bytes for d in plan.devices},
    }


if __name__ == "__main__":
    sys.exit(main())
