"""Measured against predicted peaks on the GPUs of this machine, and the constants in costs.py.

    python benchmarks/peaks.py --out results/peaks                  # every case that fits
    python benchmarks/peaks.py --tiers 4bit --gpus 1 --contexts 128,2048 --batches 1
    python benchmarks/peaks.py --dry-run --simulate 4xH100          # predictions only, no GPU
    python benchmarks/peaks.py --beside                             # 1 and 2 GPUs side by side
    python benchmarks/peaks.py --again results/peaks-h100x4.json --simulate 4xH100 --out FILE

Every context and batch is generated with ``model.generate``, and probed, by a process of its own,
which loads the model (balanced placement, weights synthesised) and passes a few tokens first. One
process for all would not do over several GPUs: what the driver keeps of one case decides which
addresses it gives to the next. Several sequences are of unequal lengths, left-padded, as the plan
takes them to be. Measured is the largest NVML ``used`` in the phase, so nothing else may run on
the GPUs; ``--beside`` runs smaller numbers of GPUs side by side, each on its own. A case that the
plan refuses is not run; one that would take longer than ``--seconds`` by a rough estimate neither:
both are listed as such. The cheapest come first. Written after every case to ``OUT.json`` and
``OUT.md``, by a dry run only where ``--out`` names one.
With ``PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True`` in the environment, all of it is about
that allocator.
``--again`` measures nothing: it puts the predictions of this commit beside peaks measured earlier,
of the GPU that was the worst one then.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from peak_table import Case, constants, read_cases, read_hardware, row, write

from pytest_multigpu.decoders import decoder_of
from pytest_multigpu.machine.torch_allocator import expandable_segments
from pytest_multigpu.model.architecture import describe
from pytest_multigpu.model.config import resolve_config
from pytest_multigpu.model.peaks import padded_inputs, padding_mask
from pytest_multigpu.planning.balance import balanced
from pytest_multigpu.planning.peaks import predict
from pytest_multigpu.planning.simulate import simulate
from pytest_multigpu.records.machine import Machine
from pytest_multigpu.records.plan import Architecture, DevicePlan, Plan, Tier
from pytest_multigpu.records.probe import default_layer
from pytest_multigpu.units import MIB

PHASES = ("generate", "probe")
PRELOAD = ["transformers.models.llama.modeling_llama", "pytest_multigpu.model.loading"]
FIRST_TOKENS = 16
"""Passed before anything is measured: cuBLAS takes its workspaces, kernels are loaded."""
STEPS = 8
"""Tokens generated one by one in every case."""
AGAIN = "; measured earlier, predicted by this commit"
FLOPS = {"16bit": 4e14, "8bit": 1e14, "4bit": 3e14}
"""A second, on one H100, for the time estimate only."""


class UsedMemory:
    """Largest NVML ``used`` of each GPU while a phase runs, sampled in a thread."""

    def __init__(self, machine: Machine) -> None:
        import pynvml

        pynvml.nvmlInit()
        self._nvml: Any = pynvml
        self._handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in machine.visible]

    def now(self) -> list[int]:
        version = self._nvml.nvmlMemory_v2
        return [
            int(self._nvml.nvmlDeviceGetMemoryInfo(handle, version=version).used)
            for handle in self._handles
        ]

    @contextmanager
    def peak(self) -> Iterator[list[int]]:
        """The list is final once the block is left."""
        found, done = self.now(), threading.Event()

        def sample() -> None:
            while not done.wait(0.02):
                for i, used in enumerate(self.now()):
                    found[i] = max(found[i], used)

        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        try:
            yield found
        finally:
            done.set()
            thread.join()
            for i, used in enumerate(self.now()):
                found[i] = max(found[i], used)


def first_gpus(machine: Machine, count: int) -> Machine:
    """The machine as if CUDA saw its first ``count`` GPUs only."""
    return replace(machine, visible=machine.visible[:count])


def plan_of(
    architecture: Architecture, machine: Machine, placed: Any, context: int, batch: int
) -> Plan:
    return predict(
        architecture,
        placed,
        machine,
        context_tokens=context,
        batch=batch,
        weights="synthetic",
        placement="balanced",
        new_tokens=STEPS,
    )


def generate(model: Any, device: Any, prompt: int, batch: int) -> None:
    import torch

    tokens = torch.randint(10, 1000, (batch, prompt), device=device)
    mask = padding_mask(batch, prompt, device)
    with torch.no_grad():
        model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens) if mask is None else mask,
            do_sample=False,
            min_new_tokens=STEPS,
            max_new_tokens=STEPS,
            pad_token_id=0,
        )


def probe(loaded: Any, prompt: int, batch: int) -> None:
    import torch

    found = []
    layers = loaded.decoder_layers
    layer = layers[default_layer(len(layers)) - 1]
    hook = layer.register_forward_hook(lambda _module, _inputs, output: found.append(output))
    tokens = torch.randint(10, 1000, (batch, prompt), device=loaded.input_device)
    decoder = decoder_of(loaded.model)
    more = padded_inputs(decoder, padding_mask(batch, prompt, loaded.input_device), prompt)
    try:
        with torch.no_grad():
            decoder(input_ids=tokens, **more, use_cache=False)
        output = found[0][0] if isinstance(found[0], tuple) else found[0]
        output.float().mean().item()
    finally:
        hook.remove()


def measure(plan: Plan, phase: str, used: list[int], stamp: dict[str, Any]) -> Case:
    """The GPU of this phase whose prediction is worst."""
    import torch

    rows = []
    for device in plan.devices:
        i = int(device.device.removeprefix("cuda:"))
        rows.append(
            Case(
                **stamp,
                phase=phase,
                outcome="measured",
                gpu=i,
                predicted_bytes=predicted(device, phase),
                measured_bytes=used[i],
                reserved_bytes=torch.cuda.max_memory_reserved(i),
                allocated_bytes=torch.cuda.max_memory_allocated(i),
            )
        )
    return max(
        rows, key=lambda row: abs(row.error_bytes) / max(256 * MIB, row.measured_bytes * 2 // 100)
    )


def fresh(count: int) -> None:
    import torch

    gc.collect()
    torch.cuda.empty_cache()
    for i in range(count):
        torch.cuda.reset_peak_memory_stats(i)


def run_group(
    architecture: Architecture, machine: Machine, arguments: argparse.Namespace
) -> Iterator[Case]:
    """All contexts and batches of one tier on the visible GPUs of ``machine``."""
    count = len(machine.visible)
    tier: Tier = architecture.tier
    placed = balanced(architecture, machine, context_tokens=2048, batch=1)
    sizes = [(c, b) for c in arguments.contexts for b in arguments.batches]
    plans = {(c, b): plan_of(architecture, machine, placed, c, b) for c, b in sizes}
    sizes.sort(key=lambda size: max(d.peak_bytes for d in plans[size].devices))

    def not_run(context: int, batch: int, why: str) -> Case:
        return Case(
            tier=tier, gpus=count, context_tokens=context, batch=batch, phase="all", outcome=why
        )

    if arguments.dry_run or not plans[sizes[0]].fits:
        for context, batch in sizes:
            plan = plans[context, batch]
            worst = max(plan.devices, key=lambda device: device.peak_bytes)
            yield replace(
                not_run(context, batch, "dry run" if plan.fits else "; ".join(plan.reasons)),
                gpu=int(worst.device.removeprefix("cuda:")),
                predicted_bytes=worst.peak_bytes,
            )
        return
    told = False
    for context, batch in sizes:
        plan = plans[context, batch]
        seconds = 2 * architecture.parameters * context * batch / FLOPS[tier] * 2
        if not plan.fits:
            yield not_run(context, batch, "; ".join(plan.reasons))
            continue
        if seconds > arguments.seconds:
            yield not_run(context, batch, f"not run: would take about {seconds:.0f} s")
            continue
        for phase in PHASES:
            work = (arguments.model, architecture, machine, plan, placed, phase)
            loading, case = in_own_process(measured, *work)
            if not told:  # the same every time
                yield loading
                told = True
            yield case
            if case.outcome != "measured":
                break


def in_own_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """What ``work`` returns in a process that has imported all that it needs and used no GPU."""
    # To count GPUs through CUDA would leave the processes to come without it.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(work, *arguments).result()


def measured(
    model: str,
    architecture: Architecture,
    machine: Machine,
    plan: Plan,
    placed: Any,
    phase: str,
) -> tuple[Case, Case]:
    """Loading and one phase, from the beginning of this process."""
    import torch

    from pytest_multigpu.model.loading import load_model

    used, count = UsedMemory(machine), len(machine.visible)
    size = {"context_tokens": plan.context_tokens, "batch": plan.batch}
    stamp = {"tier": architecture.tier, "gpus": count}
    with used.peak() as peak:
        loaded = load_model(
            model,
            tier=architecture.tier,
            device_map=placed,
            weights="synthetic",
            architecture=architecture,
        )
    loading = measure(plan, "load", peak, {**stamp, "context_tokens": 0, "batch": 0})
    generate(loaded.model, loaded.input_device, FIRST_TOKENS, 1)
    fresh(count)
    prompt = plan.context_tokens - STEPS
    try:
        with used.peak() as peak:
            if phase == "generate":
                generate(loaded.model, loaded.input_device, prompt, plan.batch)
            else:
                probe(loaded, prompt, plan.batch)
    except torch.cuda.OutOfMemoryError as error:
        why = f"OUT OF MEMORY: {str(error).splitlines()[0]}"
        return loading, Case(**stamp, **size, phase=phase, outcome=why)
    return loading, measure(plan, phase, peak, {**stamp, **size})


def run_beside(
    groups: Sequence[tuple[str, int]], machine: Machine, arguments: argparse.Namespace
) -> Iterator[Case]:
    """Each tier and number of GPUs in a process of its own, on GPUs that no other has meanwhile."""
    free, changed = [gpu.uuid for gpu in machine.visible_gpus], threading.Condition()

    def one(group: tuple[str, int]) -> list[Case]:
        tier, count = group
        with changed:
            changed.wait_for(lambda: len(free) >= count)
            mine, free[:] = free[:count], free[count:]
        out = arguments.out.with_name(f"{arguments.out.name}-{tier}-{count}")
        command = [
            *(sys.executable, __file__, "--model", arguments.model, "--tiers", tier),
            *("--gpus", str(count), "--seconds", str(arguments.seconds), "--out", str(out)),
            *("--contexts", ",".join(map(str, arguments.contexts))),
            *("--batches", ",".join(map(str, arguments.batches))),
        ]
        try:
            subprocess.run(
                command, env={**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(mine)}, check=False
            )
        finally:
            with changed:
                free.extend(mine)
                changed.notify_all()
        cases = read_cases(out.with_suffix(".json"))
        for suffix in (".json", ".md"):  # a run that is cut short leaves them
            out.with_suffix(suffix).unlink()
        return cases

    with ThreadPoolExecutor(len(groups)) as pool:
        for cases in pool.map(one, groups):
            yield from cases


def predicted_again(cases: Sequence[Case], machine: Machine, model: str) -> Iterator[Case]:
    """The same measurements beside this commit's predictions."""
    resolved = resolve_config(model)
    for case in cases:
        if case.outcome != "measured":
            yield case
            continue
        architecture = describe(resolved, tier=case.tier)  # type: ignore[arg-type]
        own = first_gpus(machine, case.gpus)
        placed = balanced(architecture, own, context_tokens=2048, batch=1)
        context, batch = case.context_tokens or 128, case.batch or 1
        plan = plan_of(architecture, own, placed, context, batch)
        device = next(d for d in plan.devices if d.device == f"cuda:{case.gpu}")
        yield replace(case, predicted_bytes=predicted(device, case.phase))


def predicted(device: DevicePlan, phase: str) -> int:
    peaks = device.peaks
    return {
        "load": peaks.load_bytes,
        "generate": max(peaks.prefill_bytes, peaks.decode_bytes),
        "probe": peaks.probe_bytes,
    }[phase]


def hardware_of(machine: Machine, *, dry: bool) -> str:
    """GPUs, driver and versions, in a line."""
    name = machine.visible_gpus[0].name
    if dry:
        return machine.simulated or name
    packages = ("torch", "transformers", "accelerate", "bitsandbytes")
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
    grows = ", expandable segments" if machine.expandable_segments else ""
    return f"{len(machine.visible)} x {name}, driver {machine.driver}, {versions}{grows}"


def cases_of(
    counts: Sequence[int], machine: Machine, arguments: argparse.Namespace
) -> Iterator[Case]:
    """Every case of every tier and number of GPUs."""
    if arguments.again:
        yield from predicted_again(read_cases(arguments.again), machine, arguments.model)
        return
    groups = [(tier, count) for count in counts for tier in arguments.tiers]
    if arguments.beside and not arguments.dry_run:
        yield from run_beside(groups, machine, arguments)
        return
    resolved = resolve_config(arguments.model)
    for tier, count in groups:
        architecture = describe(resolved, tier=tier)
        yield from run_group(architecture, first_gpus(machine, count), arguments)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser.add_argument("--model", default="llama-3.3-70b")
    parser.add_argument("--tiers", type=lambda text: text.split(","), default=list(FLOPS))
    parser.add_argument("--gpus", type=numbers, help="numbers of GPUs; default 1, 2 and 4")
    parser.add_argument("--contexts", type=numbers, default=[128, 2048, 8192, 32768])
    parser.add_argument("--batches", type=numbers, default=[1, 8])
    parser.add_argument("--seconds", type=float, default=60.0, help="skip slower cases")
    parser.add_argument("--out", type=Path, help="default: results/peaks, or none if dry")
    parser.add_argument("--beside", action="store_true", help="runs side by side, on GPUs each")
    parser.add_argument("--again", type=Path, help="predict anew beside what that file measured")
    parser.add_argument("--dry-run", action="store_true", help="predictions only")
    parser.add_argument("--simulate", help="a machine that isn't there, with --dry-run")
    arguments = parser.parse_args()
    if not arguments.out and not arguments.dry_run:
        arguments.out = Path("results/peaks")

    if arguments.simulate:
        grows = expandable_segments(os.environ)
        machine = replace(simulate(arguments.simulate), expandable_segments=grows)
    else:
        from pytest_multigpu.machine.nvml import read_machine

        machine = read_machine()
    if not machine.visible:
        print(machine.problem or "no GPU is visible", file=sys.stderr)
        return 1
    if arguments.again:
        hardware = read_hardware(arguments.again).removesuffix(AGAIN) + AGAIN
    else:
        hardware = hardware_of(machine, dry=arguments.dry_run)
    counts = [n for n in arguments.gpus or [1, 2, 4] if n <= len(machine.visible)]
    cases: list[Case] = []
    started = time.monotonic()
    for case in cases_of(counts, machine, arguments):
        cases.append(case)
        if not arguments.beside:
            print(row(case), flush=True)
        if arguments.out:
            write(cases, hardware, arguments.out, constants(cases))
    print(f"{time.monotonic() - started:.0f} s; {arguments.out or 'nothing written'}")
    return int(any(case.wrong for case in cases))


if __name__ == "__main__":
    sys.exit(main())
