"""What to rent: the configurations that fit, cheapest first.

Speeds are estimates for transformers' ``generate`` (:mod:`.speed`). Layers run one after the other,
so more GPUs do not make one sequence faster. Imports records and its own part.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..records.plan import Architecture, Tier
from ..records.rent import RentRow
from .catalogue import CATALOGUE, GpuType
from .costs import Costs, costs_for
from .partition import Card, contiguous, place_groups, units
from .peaks import room
from .replay import kv_bytes, replay
from .speed import step_seconds

MAX_COUNT = 16


def rent_table(
    architectures: Mapping[Tier, Architecture],
    *,
    context_tokens: int,
    batch: int,
    catalogue: tuple[GpuType, ...] = CATALOGUE,
) -> tuple[RentRow, ...]:
    """For each GPU type with a price and each tier the fewest GPUs that fit, by price.

    :param architectures: the same model in each tier to consider.
    """
    rows = []
    needs: dict[tuple[Tier, int, Costs], int] = {}
    for row in catalogue:
        if row.price_usd_hour is None:
            continue
        for tier, architecture in architectures.items():
            if not runs_on(row, architecture):
                continue
            found = _fewest(row, architecture, context_tokens, batch, needs)
            if found is None:
                continue
            count, peak = found
            speed = tokens_per_second(architecture, row, count) * batch
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
                    usd_per_million_tokens=price / (speed * 3600) * 1e6,
                )
            )
    return tuple(sorted(rows, key=lambda r: (r.price_usd_hour, r.gpu, r.tier)))


def runs_on(row: GpuType, architecture: Architecture) -> bool:
    """bfloat16 needs compute capability 8.0, LLM.int8 7.5; an unknown one is let through."""
    if row.capability is None:
        return True
    if architecture.dtype == "bfloat16" and row.capability < (8, 0):
        return False
    return architecture.tier != "8bit" or row.capability >= (7, 5)


def tokens_per_second(architecture: Architecture, row: GpuType, count: int) -> float:
    """Estimated decode speed of one sequence."""
    tables = sum(b.weights_bytes for b in architecture.blocks if b.kind == "embedding")
    if any(b.tied_to for b in architecture.blocks):
        tables = 0  # the head reads them
    read = (architecture.weights_bytes - tables) / (row.bandwidth_gb_s * 1e9)
    return 1 / step_seconds(read, layers=architecture.layers, tier=architecture.tier, gpus=count)


def _fewest(
    row: GpuType,
    architecture: Architecture,
    context: int,
    batch: int,
    needs: dict[tuple[Tier, int, Costs], int],
) -> tuple[int, int] | None:
    """The fewest equal GPUs that fit, and the fullest one's predicted peak."""
    costs = costs_for(row.capability)
    # The weights must be somewhere; beyond that every count is tried.
    for count in range(architecture.weights_bytes // row.free_bytes + 1, MAX_COUNT + 1):
        key = (architecture.tier, count, costs)
        if key not in needs:
            needs[key] = _need(architecture, count, costs, context, batch)
        if needs[key] <= room(row.free_bytes):
            return count, needs[key]
    return None


def _need(architecture: Architecture, count: int, costs: Costs, context: int, batch: int) -> int:
    """The fullest of ``count`` equal GPUs with the layers spread evenly by bytes."""
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
        probe=False,
    )
    return max(use.peaks.worst_bytes for use in used.values())
