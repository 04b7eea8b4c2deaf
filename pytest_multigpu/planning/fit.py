"""The largest context that fits, the best tier that fits, and what would make a plan fit.

Imports units, records and its own part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from ..records.machine import Machine
from ..records.plan import Architecture, DeviceMap, Plan, Tier
from ..records.tiers import GPU_TIERS
from ..units import gib
from .partition import balanced
from .peaks import Predictor, predict
from .search import Fit, climbed, last_that_fits

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
    known: int = 0,
) -> int:
    """Tokens per sequence of the longest context found whose plan fits; 0 if not even one does.

    At most the model's own ``max_position_embeddings``. Found to 1 part in ``PRECISION`` (and to
    16 tokens), never above the true value. Now and then a longer one fits all the same, and a
    shorter one does not: see :func:`.search.climbed`.

    :param device_map: a map, or what makes one for a context (``balanced`` moves layers when the
        cache grows).
    :param known: a context whose plan fits; the answer is no shorter.
    """
    longest = max(known, architecture.max_context or LONGEST)
    if architecture.tier != "cpu" and architecture.weights_bytes > _free_bytes(machine):
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

    most = fit(longest)
    if most.fits:
        return longest
    shortest = known or 1
    least = fit(shortest)
    if not least.fits:
        return known
    answer = last_that_fits(
        fit, (shortest, least.spare_bytes), (longest, most.spare_bytes), precision=PRECISION
    )
    return climbed(fit, answer, below=longest, precision=PRECISION)


def _free_bytes(machine: Machine) -> int:
    return sum(gpu.free_bytes for gpu in machine.visible_gpus)


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
    if not plan.offloaded:
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
    device = max(plan.devices, key=lambda d: d.peak_bytes / d.limit_bytes)
    return (
        f"GPU {device.device.removeprefix('cuda:')} would peak at {gib(device.peak_bytes)} of "
        f"{gib(device.limit_bytes)}"
    )


def _more_gpus(plan: Plan, machine: Machine, most: int) -> str:
    """How many GPUs like the machine's largest the model needs."""
    largest = max(machine.visible_gpus, key=lambda gpu: gpu.total_bytes, default=None)
    if largest is None or not largest.total_bytes:
        return ""
    free = largest.total_bytes - largest.reserved_bytes
    # The weights must be somewhere; beyond that every count is tried.
    for count in range(plan.weights_bytes // free + 1, most + 1):
        gpus = tuple(replace(largest, index=i, free_bytes=free) for i in range(count))
        idle = Machine(gpus=gpus, visible=tuple(range(count)))
        other = _balanced_plan(plan.architecture, idle, plan.context_tokens, plan.batch)
        if other is not None and other.fits:
            what = f"{count} x {largest.name}"
            if count <= len(machine.visible):
                return f"{what} with nothing else on them would do: free their memory"
            return f"rent {what}: with --gpu-placement=balanced {_fullest(other)}"
    return ""
