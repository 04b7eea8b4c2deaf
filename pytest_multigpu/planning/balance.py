"""``--gpu-placement=balanced``: the partition whose fullest GPU is predicted to be least full.

It begins where :mod:`.partition` is exact: for weights, cache and what each GPU held beside them in
the last replay. That changes in steps as layers come and go, wherever a freed segment is just too
small to be used again; so blocks then move off the fullest GPU, or onto it, one at a time, as long
as a replay finds it better. Where layers are alike and one more never takes less, no partition is
better than the one where this ends: a better one would have fewer layers on the fullest GPU, so
more on some other, and one more there would have been taken. Imports errors, records and its own
part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..errors import UsageError
from ..records.machine import Machine
from ..records.plan import Architecture, DeviceMap, Plan, WeightsSource
from .costs import costs_for
from .known import Known
from .partition import Card, contiguous, place_groups, units
from .peaks import Predictor
from .replay import kv_bytes

ROUNDS = 3
"""Predict, partition, predict again with what each GPU then holds beside weights and KV."""

NOWHERE = (
    "--gpu-placement=balanced: CUDA sees no GPU with free memory; free one, or use --gpu-tier=cpu"
)


def balanced(
    architecture: Architecture, machine: Machine, *, context_tokens: int, batch: int
) -> DeviceMap:
    """The balanced device map: block name to CUDA index, a key for each block.

    :raises UsageError: no GPU with free memory is visible.
    """
    plan = balanced_plan(architecture, machine, context_tokens, batch)
    if plan is None:
        raise UsageError(NOWHERE)
    return plan.device_map


def balanced_plan(
    architecture: Architecture,
    machine: Machine,
    tokens: int,
    batch: int,
    *,
    weights: WeightsSource = "synthetic",
) -> Plan | None:
    """The plan of the balanced placement; None where no GPU has a free byte."""
    if not any(gpu.free_bytes > 0 for gpu in machine.visible_gpus):
        return None
    search = _Search(architecture, machine, tokens, batch, weights)
    return search.settled(search.started()).plan


def fitting_plan(
    architecture: Architecture,
    machine: Machine,
    tokens: int,
    batch: int,
    *,
    known: Known | None = None,
) -> Plan | None:
    """The first plan that fits on the way to the balanced one, whose fullest GPU is no fuller.

    None where the balanced one does not fit either.

    :param known: of this model, where several machines are asked about.
    """
    search = _Search(
        architecture, machine, tokens, batch, "synthetic", enough_if_fits=True, known=known
    )
    plan = search.settled(search.started()).plan
    return plan if plan.fits else None


@dataclass(frozen=True, kw_only=True)
class _Spread:
    """A partition and what a replay says of it."""

    plan: Plan
    counts: tuple[int, ...]
    """Groups on each GPU."""
    needs: Mapping[int, int]
    """CUDA index to predicted peak bytes; without GPUs that hold nothing."""
    shares: tuple[float, ...]
    """Of each GPU's free bytes."""

    @property
    def rank(self) -> list[float]:
        """The smaller the better: the fullest GPU first."""
        return sorted(self.shares, reverse=True)


class _Search:
    """Partitions of one model over one machine, each replayed once."""

    def __init__(
        self,
        architecture: Architecture,
        machine: Machine,
        tokens: int,
        batch: int,
        weights: WeightsSource,
        *,
        enough_if_fits: bool = False,
        known: Known | None = None,
    ) -> None:
        self._known = known or Known(architecture)
        self._enough = enough_if_fits
        self._architecture, self._machine = architecture, machine
        self._tokens, self._batch, self._weights = tokens, batch, weights
        self._groups = units(architecture)
        self._sizes = [
            sum(block.weights_bytes + kv_bytes(block, tokens, batch) for block in group)
            for group in self._groups
        ]
        grows = machine.expandable_segments
        self._free = [gpu.free_bytes for gpu in machine.visible_gpus]
        self._contexts = {
            i: costs_for(gpu.capability, expandable_segments=grows).context_bytes
            for i, gpu in enumerate(machine.visible_gpus)
        }
        self._spreads: dict[tuple[int, ...], _Spread] = {}

    def started(self) -> _Spread:
        """The best of a few exact partitions, each for what the one before held beside."""
        base = dict(self._contexts)
        spread = self._replayed(self._partition(base))
        for _ in range(1, ROUNDS):
            if self._enough and spread.plan.fits:
                return spread
            for i, need in spread.needs.items():
                first = sum(spread.counts[:i])
                base[i] = need - sum(self._sizes[first : first + spread.counts[i]])
            counts = self._partition(base)
            if counts in self._spreads:
                break  # what each GPU holds beside follows from the counts
            spread = self._replayed(counts)
        return min(self._spreads.values(), key=lambda spread: max(spread.shares))

    def settled(self, spread: _Spread) -> _Spread:
        """Where no move of one group off the fullest GPU helps."""
        better: _Spread | None = spread
        while better is not None:
            spread = better
            if self._enough and spread.plan.fits:
                return spread
            rank = spread.rank
            better = next((one for one in self._moved(spread) if one.rank < rank), None)
        return spread

    def _moved(self, spread: _Spread) -> Iterator[_Spread]:
        """A group less on the fullest GPU and one more on another, those between them shifted; then
        one more on the fullest, which now and then takes less. Where that does not fit, by two as
        well."""
        shares, counts = spread.shares, spread.counts
        emptiest = sorted(range(len(shares)), key=shares.__getitem__)
        fullest = max(emptiest, key=shares.__getitem__)
        for by in (1,) if spread.plan.fits else (1, 2):
            for to in emptiest:
                if self._free[to] > 0 and shares[to] < shares[fullest] and counts[fullest] >= by:
                    yield self._replayed(_shifted(counts, fullest, to, by))
            for of in reversed(emptiest):
                if of != fullest and counts[of] >= by:
                    yield self._replayed(_shifted(counts, of, fullest, by))

    def _partition(self, base: Mapping[int, int]) -> tuple[int, ...]:
        cards = [Card(free_bytes=free, base_bytes=base[i]) for i, free in enumerate(self._free)]
        return tuple(contiguous(self._sizes, cards))

    def _replayed(self, counts: tuple[int, ...]) -> _Spread:
        if counts not in self._spreads:
            placed = place_groups(self._architecture, self._groups, counts)
            made = Predictor(
                self._architecture,
                placed,
                self._machine,
                weights=self._weights,
                known=self._known,
            )
            plan = made.plan(context_tokens=self._tokens, batch=self._batch, placement="balanced")
            needs = {int(d.device.removeprefix("cuda:")): d.peak_bytes for d in plan.devices}
            self._spreads[counts] = _Spread(
                plan=plan,
                counts=counts,
                needs=needs,
                shares=tuple(
                    needs[i] / free if i in needs else 0.0 for i, free in enumerate(self._free)
                ),
            )
        return self._spreads[counts]


def _shifted(counts: Sequence[int], of: int, to: int, by: int) -> tuple[int, ...]:
    moved = list(counts)
    moved[of] -= by
    moved[to] += by
    return tuple(moved)
