"""What to rent: the configurations that fit under the balanced placement, cheapest first.

Where even shares of the layers leave every GPU some room, balanced ones do too, and many types
share that replay. Only near a GPU's limit a balanced plan of the very machine is looked for; not
where even shares would be too much for the mean GPU.

Speeds are estimates for transformers' ``generate`` (:mod:`.speed`). Layers run one after the other,
so more GPUs do not make one sequence faster. Imports records and its own part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from heapq import heappop, heappush
from itertools import islice
from typing import NamedTuple

from ..records.plan import Architecture, Parts, Tier
from ..records.rent import MAX_COUNT, RentRow
from .balance import fitting_plan
from .barred import beyond_positions, runs_on
from .catalogue import CATALOGUE, GpuType
from .costs import Costs, costs_for
from .known import Known
from .partition import Card, contiguous, place_groups, units
from .peaks import NEAR, room
from .replay import kv_bytes, replay
from .simulate import idle_machine
from .speed import step_bytes, step_seconds

NEVER = 1 << 30
"""More cards than anybody has."""


def rent_table(
    architectures: Mapping[Tier, Architecture],
    *,
    context_tokens: int,
    batch: int,
    catalogue: tuple[GpuType, ...] = CATALOGUE,
    expandable_segments: bool = False,
    most: int | None = None,
) -> tuple[RentRow, ...]:
    """For each GPU type with a price and each tier the fewest GPUs that fit, by price.

    :param architectures: the same model in each tier to consider.
    :param expandable_segments: of torch's allocator, see :class:`.Machine`.
    :param most: rows of each tier, the cheapest; None for all.
    """
    rows: list[RentRow] = []
    for architecture in architectures.values():
        offers = by_price(
            architecture,
            context_tokens=context_tokens,
            batch=batch,
            catalogue=catalogue,
            expandable_segments=expandable_segments,
        )
        rows += islice(offers, most)
    return tuple(sorted(rows, key=lambda r: (r.price_usd_hour, r.gpu, r.tier)))


def by_price(
    architecture: Architecture,
    *,
    context_tokens: int,
    batch: int,
    catalogue: tuple[GpuType, ...] = CATALOGUE,
    expandable_segments: bool = False,
) -> Iterator[RentRow]:
    """The rows of one tier, each looked for when it is asked for: dearer ones cost no time.

    What could be the cheapest is tried first; if it does not do, more GPUs of its type wait for
    their turn. None for more tokens than the model has positions.
    """
    if beyond_positions(architecture, context_tokens):
        return
    look = _Look(architecture, context_tokens, batch, expandable_segments)
    turns: list[tuple[float, str, int, int]] = []

    def wait(place: int, count: int) -> None:
        row = catalogue[place]
        if row.price_usd_hour is not None and count <= MAX_COUNT:
            heappush(turns, (row.price_usd_hour * count, row.key, count, place))

    for place, row in enumerate(catalogue):
        if runs_on(row.capability, architecture):
            # The weights must be somewhere; beyond that every count that may do is tried.
            wait(place, architecture.weights_bytes // row.free_bytes + 1)
    while turns:
        price, key, count, place = heappop(turns)
        row = catalogue[place]
        peak = look.peak(row, count)
        if peak is None:
            wait(place, look.following(row, count))
            continue
        speed = tokens_per_second(
            architecture, row, count, context_tokens=context_tokens, batch=batch
        )
        yield RentRow(
            gpu=key,
            count=count,
            tier=architecture.tier,
            peak_bytes=peak,
            free_bytes=row.free_bytes,
            tokens_per_second=speed,
            price_usd_hour=price,
            price_guessed=row.price_guessed,
            usd_per_million_tokens=price / (speed * 3600) * 1e6,
        )


def tokens_per_second(
    architecture: Architecture, row: GpuType, count: int, *, context_tokens: int = 0, batch: int = 1
) -> float:
    """Estimated decode speed, all sequences of the batch together.

    :param context_tokens: in the cache of each sequence: a step reads them all, once.
    """
    moved = step_bytes(architecture, context_tokens=context_tokens, batch=batch, copies=True)
    seconds = sum(moved.values()) / (row.bandwidth_gb_s * 1e9)
    return batch / step_seconds(architecture, seconds, gpus=count)


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


class _Need(NamedTuple):
    """What a number of equal GPUs needs, with the layers in even shares."""

    peak_bytes: int
    """On the fullest."""
    least_bytes: int
    """About the least that would do on the mean one, cached memory given back: no split does with
    much less on its fullest."""
    shared_bytes: int
    """Weights and KV cache of all."""
    own_bytes: int
    """Beside those, on the GPU with the least of it."""


class _Look:
    """One model and context, tried on numbers of equal GPUs."""

    def __init__(
        self, architecture: Architecture, context: int, batch: int, expandable_segments: bool
    ) -> None:
        self._architecture, self._context, self._batch = architecture, context, batch
        self._grows = expandable_segments
        self._needs: dict[tuple[int, Costs], _Need] = {}
        self._known = Known(architecture)

    def peak(self, row: GpuType, count: int) -> int | None:
        """The fullest GPU's predicted peak in a split that fits; None if none was found."""
        most, need = room(row.free_bytes), self._evenly(row, count)
        if need.peak_bytes <= NEAR * most:
            return need.peak_bytes
        if need.least_bytes > most:
            return None
        machine = idle_machine([row] * count, f"{count}x{row.key}")
        machine = replace(machine, expandable_segments=self._grows)
        plan = fitting_plan(
            self._architecture, machine, self._context, self._batch, known=self._known
        )
        return None if plan is None else max(device.peak_bytes for device in plan.devices)

    def following(self, row: GpuType, count: int) -> int:
        """The next number that may do where ``count`` does not."""
        need = self._evenly(row, count)
        return max(count + 1, fewest(need.shared_bytes, need.own_bytes, row.free_bytes))

    def _evenly(self, row: GpuType, count: int) -> _Need:
        costs = costs_for(row.capability, expandable_segments=self._grows)
        if (count, costs) not in self._needs:
            self._needs[count, costs] = _need(self._known, count, costs, self._context, self._batch)
        return self._needs[count, costs]


def _need(known: Known, count: int, costs: Costs, context: int, batch: int) -> _Need:
    """``count`` equal GPUs with the layers spread evenly by bytes."""
    architecture = known.architecture
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
        known=known,
    )
    uses = used.values()
    return _Need(
        peak_bytes=max(use.peaks.worst_bytes for use in uses),
        least_bytes=sum(use.least_bytes for use in uses) // count,
        shared_bytes=sum(sizes),
        own_bytes=min(least_own(use.parts) for use in uses),
    )
