"""The largest context that fits, the best tier that fits, and what would make a plan fit.

Imports units, records and its own part.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from ..records.machine import Machine
from ..records.plan import Architecture, DeviceMap, Plan, Tier
from ..records.tiers import GPU_TIERS
from ..units import gib
from .partition import balanced
from .peaks import Predictor, predict
from .replay import kv_bytes
from .search import Fit, last_that_fits

LONGEST = 1 << 20
"""Tokens; where the model states no ``max_position_embeddings``."""
PRECISION = 256
"""The largest context is found to one part in that many."""


def largest_context(
    architecture: Architecture,
    device_map: DeviceMap | Callable[[int], DeviceMap],
    machine: Machine,
    *,
    batch: int = 1,
) -> int:
    """Tokens per sequence of the longest context whose plan fits; 0 if not even one does.

    At most the model's own ``max_position_embeddings``. Found to 1 part in ``PRECISION`` (and to
    16 tokens), never above the true value.

    :param device_map: a map, or what makes one for a context (``balanced`` moves layers when the
        cache grows).
    """
    longest = architecture.max_context or LONGEST
    beyond, lacking = _plainly_too_long(architecture, machine, longest, batch), None
    if beyond <= 1:
        return 0
    if callable(device_map):
        place = device_map

        def fit(tokens: int) -> Fit:
            made = Predictor(architecture, place(tokens), machine)
            return made.fit(context_tokens=tokens, batch=batch)
    else:
        fixed = Predictor(architecture, device_map, machine)

        def fit(tokens: int) -> Fit:
            return fixed.fit(context_tokens=tokens, batch=batch)

    if beyond > longest:
        found = fit(longest)
        if found.fits:
            return longest
        beyond, lacking = longest, found.spare_bytes
    one = fit(1)
    if not one.fits:
        return 0
    return last_that_fits(fit, (1, one.spare_bytes), (beyond, lacking), precision=PRECISION)


def _plainly_too_long(
    architecture: Architecture, machine: Machine, longest: int, batch: int
) -> int:
    """The shortest context, up to ``longest``, whose weights and KV alone exceed all GPUs
    together: no replay is needed to refuse it. ``longest + 1`` if there is none."""
    if architecture.tier == "cpu":
        return longest + 1
    left = sum(gpu.free_bytes for gpu in machine.visible_gpus) - architecture.weights_bytes

    def exceeds(tokens: int) -> bool:
        return sum(kv_bytes(block, tokens, batch) for block in architecture.blocks) > left

    return bisect_left(range(1, longest + 1), True, key=exceeds) + 1


def choose_tier(
    plan_of: Callable[[Tier], Plan], tiers: Sequence[Tier] = GPU_TIERS
) -> tuple[Plan | None, tuple[Plan, ...]]:
    """The first of ``tiers`` (best first) whose plan fits, and the plans that were refused.

    Plans are made one by one, so that a better tier that fits costs no others.
    """
    refused: list[Plan] = []
    for tier in tiers:
        plan = plan_of(tier)
        if plan.fits:
            return plan, tuple(refused)
        refused.append(plan)
    return None, tuple(refused)


def remedies(
    plan: Plan,
    machine: Machine,
    *,
    architectures: Mapping[Tier, Architecture] | None = None,
    most_gpus: int = 16,
) -> tuple[str, ...]:
    """What would make a plan that does not fit fit, the least change first; () if it fits.

    :param architectures: the same model in the other tiers, to look for one that fits.
    """
    if plan.fits:
        return ()
    found: list[str] = []
    tokens, batch = plan.context_tokens, plan.batch
    mendable = False
    if plan.placement != "balanced" and machine.visible:
        spread = _balanced_plan(plan.architecture, machine, tokens, batch)
        if spread is not None and spread.fits:
            mendable = True
            found.append(f"--gpu-placement=balanced fits: {_fullest(spread)}")
    if not plan.offloaded and machine.visible:
        context = largest_context(plan.architecture, plan.device_map, machine, batch=batch)
        if 0 < context < tokens:
            found.append(f"--gpu-context={context} is the longest that fits as placed")
    for tier in GPU_TIERS[GPU_TIERS.index(plan.architecture.tier) + 1 :] if machine.visible else ():
        lower = (architectures or {}).get(tier)
        other = _balanced_plan(lower, machine, tokens, batch) if lower is not None else None
        if other is not None and other.fits:
            found.append(f"--gpu-tier={tier} --gpu-placement=balanced fits: {_fullest(other)}")
            break
    # Nothing needs to be rented or freed where another placement does.
    more = "" if mendable else _more_gpus(plan, machine, most_gpus)
    if more:
        found.append(more)
    return tuple(found)


def _balanced_plan(
    architecture: Architecture, machine: Machine, tokens: int, batch: int
) -> Plan | None:
    if not any(gpu.free_bytes > 0 for gpu in machine.visible_gpus):
        return None
    placed = balanced(architecture, machine, context_tokens=tokens, batch=batch)
    return predict(
        architecture,
        placed,
        machine,
        context_tokens=tokens,
        batch=batch,
        weights="synthetic",
        placement="balanced",
    )


def _fullest(plan: Plan) -> str:
    device = max(plan.devices, key=lambda d: d.peak_bytes / max(1, d.limit_bytes))
    return (
        f"GPU {device.device.removeprefix('cuda:')} would peak at {gib(device.peak_bytes)} of "
        f"{gib(device.limit_bytes)}"
    )


def _more_gpus(plan: Plan, machine: Machine, most: int) -> str:
    """How many GPUs like the machine's largest the model needs."""
    if not machine.visible_gpus:
        return ""
    largest = max(machine.visible_gpus, key=lambda gpu: gpu.total_bytes)
    free = largest.total_bytes - largest.reserved_bytes
    # Weights and cache must be somewhere; beyond that every count is tried.
    total = plan.weights_bytes + sum(device.kv_bytes for device in plan.devices)
    for count in range(max(1, -(-total // max(1, free))), most + 1):
        gpus = tuple(
            replace(
                largest, index=i, cuda_index=i, uuid=f"SIMULATED-{i}", free_bytes=free, used_bytes=0
            )
            for i in range(count)
        )
        idle = Machine(gpus=gpus, visible=tuple(range(count)))
        other = _balanced_plan(plan.architecture, idle, plan.context_tokens, plan.batch)
        if other is not None and other.fits:
            what = "idle" if count <= len(machine.visible) else "rent"
            verb = f"{count} x {largest.name}"
            if what == "idle":
                return f"{verb} with nothing else on them would do: free their memory"
            return f"rent {verb}: with --gpu-placement=balanced {_fullest(other)}"
    return ""
