"""Where LLM.int8 met outliers, and what the replay makes of it beside what was measured.

    python benchmarks/outliers.py --sizes 2048x8 --out results/outliers-h200x4     # on GPUs
    python benchmarks/outliers.py --sizes 2048x8 --whole-norms --out FILE          # as it was
    python benchmarks/outliers.py --again results/outliers-h200x4.json --out FILE  # no GPU

LLM.int8 multiplies a column of the input in 16 bit where one of its values reaches 6.0. Each case
is one ``generate`` of the 70B in a process of its own, placed as by ``peaks.py``. Shown for each
GPU: what torch's allocator had reserved at most, as measured, as planned, and as replayed with the
columns that were found. ``--whole-norms`` synthesises norms of 1, as was done before
``model/half_norms.py``; with ``PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True`` all of it is
about that allocator. Exit 1 if a replay with the columns is off by more than ``--beyond`` MiB.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import peaks

from pytest_multigpu.machine.nvml import read_machine
from pytest_multigpu.model import synthetic
from pytest_multigpu.model.architecture import describe
from pytest_multigpu.model.config import resolve_config
from pytest_multigpu.planning import known
from pytest_multigpu.planning.balance import balanced
from pytest_multigpu.planning.linears import Linears
from pytest_multigpu.planning.simulate import simulate
from pytest_multigpu.records.machine import Machine
from pytest_multigpu.records.plan import Plan
from pytest_multigpu.units import MIB

MODEL = "llama-3.3-70b"
LINEARS = 7
"""Of a layer: q, k, v, o, gate, up, down."""


@dataclass(frozen=True, kw_only=True)
class Case:
    context_tokens: int
    batch: int
    expandable_segments: bool
    reserved_bytes: Sequence[int]
    """By GPU: the most."""
    columns: Sequence[Sequence[int]]
    """In the prefill, by layer and Linear: columns in 16 bit."""


def plan_of(machine: Machine, context: int, batch: int) -> Plan:
    architecture = describe(resolve_config(MODEL), tier="8bit")
    placed = balanced(architecture, machine, context_tokens=2048, batch=1)
    return peaks.plan_of(architecture, machine, placed, context, batch)


def measured(machine: Machine, context: int, batch: int, whole_norms: bool) -> Case:
    """One ``generate``, from the beginning of this process."""
    import torch
    from bitsandbytes import functional

    from pytest_multigpu.model.loading import load_model

    plan, count = plan_of(machine, context, batch), len(machine.visible)
    factors: Callable[..., Any] = (lambda *_: {}) if whole_norms else synthetic.factors
    with mock.patch.object(synthetic, "factors", factors):
        loaded = load_model(
            MODEL, tier="8bit", device_map=plan.device_map, weights="synthetic",
            architecture=plan.architecture,
        )  # fmt: skip
    peaks.generate(loaded.model, loaded.input_device, peaks.FIRST_TOKENS, 1)
    peaks.fresh(count)
    quantise, found = functional.int8_vectorwise_quant, []

    def watched(*arguments: Any, **options: Any) -> Any:
        made = quantise(*arguments, **options)
        found.append(0 if made[2] is None else len(made[2]))
        return made

    with mock.patch.object(functional, "int8_vectorwise_quant", watched):
        peaks.generate(loaded.model, loaded.input_device, context - peaks.STEPS, batch)
    layers = plan.architecture.layers
    return Case(
        context_tokens=context,
        batch=batch,
        expandable_segments=machine.expandable_segments,
        reserved_bytes=tuple(torch.cuda.max_memory_reserved(i) for i in range(count)),
        columns=tuple(
            tuple(found[LINEARS * layer : LINEARS * (layer + 1)]) for layer in range(layers)
        ),
    )


def reserved(plan: Plan) -> list[int]:
    """What torch's allocator has of each GPU when a plan's ``generate`` has most."""
    return [
        peaks.predicted(device, "generate") - device.parts["decode"].context_bytes
        for device in plan.devices
    ]


def replayed(machine: Machine, plan: Plan, case: Case) -> list[int]:
    """The same with the columns that were found."""
    run, calls = Linears.run, iter([kept for layer in case.columns for kept in layer])

    def with_columns(
        self: Linears, a: Any, costs: Any, t: int, rows: int, columns: int, **_: Any
    ) -> Any:
        kept = next(calls, 0)  # after the prefill: few tokens
        return run(self, a, costs, t, rows, columns, outliers=(kept + 0.5) / columns * bool(kept))

    no_two_alike = mock.patch.object(known, "marks", lambda made: range(len(made.blocks)))
    with mock.patch.object(Linears, "run", with_columns), no_two_alike:
        found = peaks.plan_of(
            plan.architecture, machine, plan.device_map, case.context_tokens, case.batch
        )
    return reserved(found)


def table(hardware: str, machine: Machine, cases: Sequence[Case]) -> tuple[str, int]:
    """As Markdown, and by how many bytes the worst replay with the columns is off."""
    lines = [
        f"# LLM.int8's outliers and torch's reserve: {hardware}",
        "",
        "MiB reserved at most while generating. Layers: those in which a column of a normed input "
        "was multiplied in 16 bit; attended: the columns after attention, least to most.",
        "",
        "| context | batch | expandable | GPU | layers | attended | planned | with the columns "
        "found | measured |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    worst = 0
    for case in cases:
        own = replace(machine, expandable_segments=case.expandable_segments)
        plan = plan_of(own, case.context_tokens, case.batch)
        for gpu, (device, before, after, was) in enumerate(
            zip(
                plan.devices,
                reserved(plan),
                replayed(own, plan, case),
                case.reserved_bytes,
                strict=True,
            )
        ):
            first, last = device.layers or (0, -1)
            here = range(first, last + 1)
            some = [layer for layer in here if any(case.columns[layer][i] for i in (0, 1, 2, 4, 5))]
            attended = [case.columns[layer][3] for layer in here]
            lines.append(
                f"| {case.context_tokens} | {case.batch} | "
                f"{'yes' if case.expandable_segments else 'no'} | {gpu} | "
                f"{', '.join(map(str, some)) or 'none'} | {min(attended)} to {max(attended)} | "
                f"{before // MIB} | {after // MIB} | {was // MIB} |"
            )
            worst = max(worst, abs(after - was))
    return "\n".join(lines) + "\n", worst


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", default="2048x8", help="CONTEXTxBATCH,...")
    parser.add_argument("--whole-norms", action="store_true")
    parser.add_argument("--again", type=Path, help="FILE.json: replay what that run found")
    parser.add_argument("--beyond", type=int, default=256, help="MiB")
    parser.add_argument("--out", type=Path, required=True, help="FILE, without .json and .md")
    options = parser.parse_args()
    if options.again:
        data = json.loads(options.again.read_text())
    else:
        machine = read_machine()
        cases = []
        for size in options.sizes.split(","):
            context, batch = map(int, size.split("x"))
            arguments = (machine, context, batch, options.whole_norms)
            cases.append(asdict(peaks.in_own_process(measured, *arguments)))
        name = machine.visible_gpus[0].name.partition("NVIDIA ")[2].partition(" ")[0]
        data = {
            "hardware": peaks.hardware_of(machine, dry=False),
            "simulate": f"{len(machine.visible)}x{name}",
            "cases": cases,
        }
        options.out.with_suffix(".json").write_text(json.dumps(data) + "\n")
    found = [Case(**case) for case in data["cases"]]
    text, worst = table(data["hardware"], simulate(data["simulate"]), found)
    print(text)
    options.out.with_suffix(".md").write_text(text)
    return int(worst > options.beyond * MIB)


if __name__ == "__main__":
    sys.exit(main())
