"""The largest context that fits, and the best tier that fits. Imports records and its own part."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..records.machine import Machine
from ..records.plan import Architecture, DeviceMap, Plan, Tier, WeightsSource
from ..records.tiers import GPU_TIERS
from .peaks import Predictor
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
    weights: WeightsSource = "synthetic",
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
            made = Predictor(architecture, place(tokens), machine, weights=weights)
            return made.fit(context_tokens=tokens, batch=batch)
    else:
        fixed = Predictor(architecture, device_map, machine, weights=weights)

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
