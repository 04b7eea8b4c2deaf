"""Whether a plan would fit with expandable segments. Imports records and its own part."""

from __future__ import annotations

from dataclasses import replace

from ..records.machine import Machine
from ..records.plan import Architecture, Plan
from .barred import why_barred
from .longest import Spread
from .peaks import predict, room
from .replay import kv_bytes

GROWS = "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
"""In the environment. Every torch reads this name; the newer one is ignored up to torch 2.9."""


def fits_grown(plan: Plan, machine: Machine, spread: Spread) -> Plan | None:
    """The same with expandable segments, as placed or else balanced, if that fits."""
    if machine.expandable_segments:
        return None
    grows = replace(machine, expandable_segments=True)
    architecture, tokens, batch = plan.architecture, plan.context_tokens, plan.batch
    if not plan.offloaded:
        placed = predict(
            architecture,
            plan.device_map,
            grows,
            context_tokens=tokens,
            batch=batch,
            weights=plan.weights,
            placement=plan.placement,
        )
        if placed.fits:
            return placed
    if plan.placement == "balanced" or not may_fit(architecture, grows, tokens, batch):
        return None
    balanced = spread(architecture, grows, tokens, batch)
    return balanced if balanced is not None and balanced.fits else None


def may_fit(architecture: Architecture, machine: Machine, tokens: int, batch: int) -> bool:
    """Nothing bars it, and there are as many bytes in all as weights and KV cache take."""
    gpus = machine.visible_gpus
    shared = architecture.weights_bytes
    shared += sum(kv_bytes(block, tokens, batch) for block in architecture.blocks)
    return (
        not why_barred(architecture, dict(enumerate(gpus)), tokens)
        and sum(room(gpu.free_bytes) for gpu in gpus) > shared
    )
