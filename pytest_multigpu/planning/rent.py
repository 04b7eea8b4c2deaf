"""What to rent: the configurations that fit under the balanced placement, cheapest first.

Where even shares of the layers leave every GPU some room, balanced ones do too, and many types
share that replay. Only near a GPU's limit a balanced plan of the very machine is looked for; not
where even shares would be too much for the mean GPU, although now and then one fits there.

Speeds are estimates for transformers' ``generate`` (:mod:`.speed`). Layers run one after the other,
so more GPUs do not make one sequence faster. Imports records and its own part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from ..records.machine import Machine
from ..records.plan import Architecture, Parts, Tier
from ..records.rent import RentRow
from .balance import fitting_plan
from .barred import runs_on
from .catalogue import CATALOGUE, GpuType
from .costs import Costs, costs_for
from .partition import Card, contiguous, place_groups, units
from .peaks import NEAR, room
from .replay import kv_bytes, replay
from .simulate import idle_machine
from .speed import step_seconds

MAX_COUNT = 16
NEVER = 1 << 30
"""More cards than anybody has."""


def rent_table(
    architectures: Mapping[Tier, Architecture],
    *,
    context_tokens: int,
    batch: int,
    catalogue: tuple[GpuType, ...] = CATALOGUE,
    expandable_segments: bool = False,
) -> tuple[RentRow, ...]:
    """For each GPU type with a price and each tier the fewest GPUs that fit, by price.

    :param architectures: the same model in each tier to consider.
    :param expandable_segments: of torch's allocator, see :class:`.Machine`.
    """
    rows = []
    needs: dict[tuple[Tier, int, Costs], _Need] = {}
    for row in catalogue:
        if row.price_usd_hour is None:
            continue
        for tier, architecture in architectures.items():
            if not runs_on(row.capability, architecture):
                continue
            costs = costs_for(row.capability, expandable_segments=expandable_segments)
            found = _fewest(row, architecture, costs, context_tokens, batch, needs)
            if found is None:
                continue
            count, peak = found
            speed = tokens_per_second(
                architecture, row, count, context_tokens=context_tokens, batch=batch
            )
            price = row.price_usd_hour * count
            rows.append(
                RentRow(
                    gpu=row.key,
                    count=count,
                    tier=tier,
                    peak_bytes=peak,
                    free_bytes=row.free_bytes,
                    tokens_per_second=speed,
                    price_usd_hour=price,
                    price_guessed=row.price_guessed,
                    usd_per_million_tokens=price / (speed * 3600) * 1e6,
                )
            )
    return tuple(sorted(rows, key=lambda r: (r.price_usd_hour, r.gpu, r.tier)))


def tokens_per_second(
    architecture: Architecture, row: GpuType, count: int, *, context_tokens: int = 0, batch: int = 1
) -> float:
    """Estimated decode speed, all sequences of the batch together.

    :param context_tokens: in the cache of each sequence: a step reads them all, once.
    """
    tables = sum(b.weights_bytes for b in architecture.blocks if b.kind == "embedding")
    if any(b.tied_to for b in architecture.blocks):
        tables = 0  # the head reads them
    read = architecture.weights_bytes - tables
    read += sum(kv_bytes(block, context_tokens, batch) for block in architecture.blocks)
    seconds = read / (row.bandwidth_gb_s * 1e9)
    step = step_seconds(seconds, layers=architecture.layers, tier=architecture.tier, gpus=count)
    return batch / step


def fewest(shared_bytes: int, own_bytes: int, free_bytes: int) -> int:
    """Fewer cards than that cannot do.

    :param shared_bytes: of weights and KV cache, which the cards share.
    :param own_bytes: what each needs beside them: see :func:`least_own`. A tenth less is granted.
    """
    left = room(free_bytes) - own_bytes * 9 // 10
    return shared_bytes // left + 1 if left > 0 else NEVER


def least_own(parts: Mapping[str, Parts]) -> int:
    """What one GPU needs beside weights, cache and slack, however few layers it has."""
    return max(part.own_bytes for part in parts.values())


def _fewest(
    row: GpuType,
    architecture: Architecture,
    costs: Costs,
    context: int,
    batch: int,
    needs: dict[tuple[Tier, int, Costs], _Need],
) -> tuple[int, int] | None:
    """The fewest equal GPUs that fit, and the fullest one's predicted peak in a split that does."""
    most = room(row.free_bytes)
    # The weights must be somewhere; beyond that every count that may do is tried.
    count = architecture.weights_bytes // row.free_bytes + 1
    while count <= MAX_COUNT:
        key = (architecture.tier, count, costs)
        if key not in needs:
            needs[key] = _need(architecture, count, costs, context, batch)
        need = needs[key]
        if need.peak_bytes <= NEAR * most:
            return count, need.peak_bytes
        if need.mean_bytes <= most:
            plan = fitting_plan(architecture, _machine(row, count, costs), context, batch)
            if plan is not None:
                return count, max(device.peak_bytes for device in plan.devices)
        count = max(count + 1, fewest(need.shared_bytes, need.own_bytes, row.free_bytes))
    return None


def _machine(row: GpuType, count: int, costs: Costs) -> Machine:
    machine = idle_machine([row] * count, f"{count}x{row.key}")
    return replace(machine, expandable_segments=costs.expandable_segments)


class _Need(NamedTuple):
    """What a number of equal GPUs needs, with the layers in even shares."""

    peak_bytes: int
    """On the fullest."""
    mean_bytes: int
    """On one of them: no split has much less on its fullest."""
    shared_bytes: int
    """Weights and KV cache of all."""
    own_bytes: int
    """Beside those, on the GPU with the least of it."""


def _need(architecture: Architecture, count: int, costs: Costs, context: int, batch: int) -> _Need:
    """``count`` equal GPUs with the layers spread evenly by bytes."""
    groups = units(architecture)
    count = min(count, len(groups))
    sizes = [
        sum(block.weights_bytes + kv_bytes(block, context, batch) for block in group)
        for group in groups
    ]
    counts = contiguous(sizes, [Card(free_bytes=1)] * count)
    used = replay(
        architecture,
        place_groups(architecture, groups, counts),
        dict.fromkeys(range(count), costs),
        context_tokens=context,
        batch=batch,
    )
    peaks = [use.peaks.worst_bytes for use in used.values()]
    own = min(least_own(use.parts) for use in used.values())
    return _Need(max(peaks), sum(peaks) // count, sum(sizes), own)
