"""Plain ``device_map="auto"`` with the max_memory that a plan names, loaded for real.

    python benchmarks/auto_caps.py --tier 8bit --out FILE.json      # one H100: auto alone refuses
    python benchmarks/auto_caps.py --tier 16bit --out FILE.json     # one H200: auto alone offloads

What auto alone would do is asked of transformers' planner on this very machine, which loads
nothing. Then the model is loaded with ``device_map="auto"`` and the max_memory, its weights
synthesised, and where its weights lie is compared with the balanced placement. Exit 0 if that is
the same and auto alone is not.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pytest_multigpu.machine.nvml import read_machine
from pytest_multigpu.options import Settings
from pytest_multigpu.planbook import PlanBook
from pytest_multigpu.records.machine import Machine
from pytest_multigpu.records.plan import Plan, auto_call


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tier", default="8bit", choices=["4bit", "8bit", "16bit"])
    parser.add_argument("--model", default="llama-3.3-70b")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    settings = Settings(model=options.model, tier=options.tier, placement="balanced")
    result = measured(settings, read_machine(os.environ))
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))
    return 0 if result["same_as_balanced"] and result["auto_alone"] != "the same" else 1


def measured(settings: Settings, machine: Machine) -> dict[str, Any]:
    """Everything but the exit code; ``same_as_balanced`` is False where there is no max_memory."""
    book = PlanBook(settings, machine, os.environ)
    plan = book.chosen
    result: dict[str, Any] = {
        "model": settings.model,
        "tier": plan.architecture.tier,
        "gpus": [gpu.name for gpu in machine.visible_gpus],
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate")},
        "balanced_fits": plan.fits,
        "call": None if plan.max_memory is None else auto_call(plan.max_memory),
        "same_as_balanced": False,
        "auto_alone": alone(book, plan),
    }
    if plan.max_memory is not None:
        result |= loaded(book, plan)
    return result


def alone(book: PlanBook, plan: Plan) -> str:
    """What auto does without max_memory, by transformers' planner and this machine's free bytes."""
    from transformers.integrations.accelerate import _get_device_map

    from pytest_multigpu.model.meta import build_meta_model

    architecture = plan.architecture
    meta = build_meta_model(book.resolved, tier=architecture.tier, dtype=architecture.dtype)
    try:
        placed = _get_device_map(meta.model, "auto", None, meta.quantizer)
    except ValueError as error:
        return f"refuses: {' '.join(str(error).split())}"
    return unlike(plan, placed) or "the same"


def loaded(book: PlanBook, plan: Plan) -> dict[str, Any]:
    """The model loaded by auto with the plan's max_memory, and where it then lies."""
    from pytest_multigpu.model.loaded import release
    from pytest_multigpu.model.loading import load_model

    assert plan.max_memory is not None
    model = load_model(
        book.resolved,
        tier=plan.architecture.tier,
        dtype=plan.architecture.dtype,
        device_map="auto",
        max_memory=dict(plan.max_memory),
        weights="synthetic",
        architecture=plan.architecture,
    )
    try:
        difference = unlike(plan, model.placement.device_map)
        return {
            "load_seconds": model.load.seconds,
            "weights_bytes": {d.device: d.weights_bytes for d in model.placement.devices},
            "same_as_balanced": not difference,
            "difference": difference,
        }
    finally:
        release(model)


def unlike(plan: Plan, placed: Any) -> str:
    """Which blocks ``placed`` has elsewhere than the plan; "" if none."""
    from pytest_multigpu.planning.device_maps import device_of, split_blocks

    architecture = plan.architecture
    moved = [
        f"{block.name} on {device_of(block.name, placed)}"
        for block in architecture.blocks
        if block.kind != "other" and device_of(block.name, placed) != plan.device_map[block.name]
    ]
    moved += [f"{name} split" for name in split_blocks(architecture, placed)]
    return ", ".join(moved)


if __name__ == "__main__":
    sys.exit(main())
