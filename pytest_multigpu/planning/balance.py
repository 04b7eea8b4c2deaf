"""``--gpu-placement=balanced``: the partition whose fullest GPU is predicted to be least full.

It begins where :mod:`.partition` is exact: for weights, cache and what each GPU held beside them in
the last replay. That changes in steps as layers come and go, wherever a freed segment is just too
small to be used again; so blocks then move off the fullest GPU, one at a time, as long as a replay
finds it better. Where layers are alike and one more never takes less, no partition is better than
the one where this ends: a better one would have fewer layers on the fullest GPU, so more on some
other, and one more there would have been taken. Imports errors, records and its own part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..errors import UsageError
from ..records.machine import Machine
from ..records.plan import Architecture
from .costs import costs_for
from .partition import Card, contiguous, place_groups, units
from .peaks import Predictor
from .replay import kv_bytes

ROUNDS = 3
"""Predict, partition, predict again with what each GPU then holds beside weights and KV."""


def balanced(
    architecture: Architecture, machine: Machine, *, context_tokens: int, batch: int
) -> dict[str, int | str]:
    """The balanced device map: block name to CUDA index, a key for each block.

    :raises UsageError: no GPU with free memory is visible.
    """
    usable = sum(gpu.free_bytes > 0 for gpu in machine.visible_gpus)
    if not usable:
        raise UsageError(
            "--gpu-placement=balanced: CUDA sees no GPU with free memory; free one, or use "
            "--gpu-tier=cpu"
        )
    search = _Search(architecture, machine, context_tokens=context_tokens, batch=batch)
    if usable == 1:
        return search.placed(search.first())
    return search.placed(search.settled(search.started()).counts)


@dataclass(frozen=True, kw_only=True)
class _Spread:
    """A partition and what a replay says of it."""

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
        self, architecture: Architecture, machine: Machine, *, context_tokens: int, batch: int
    ) -> None:
        self._architecture, self._machine = architecture, machine
        self._size = {"context_tokens": context_tokens, "batch": batch}
        self._groups = units(architecture)
        self._sizes = [
            sum(block.weights_bytes + kv_bytes(block, context_tokens, batch) for block in group)
            for group in self._groups
        ]
        grows = machine.expandable_segments
        self._free = [gpu.free_bytes for gpu in machine.visible_gpus]
        self._contexts = {
            i: costs_for(gpu.capability, expandable_segments=grows).context_bytes
            for i, gpu in enumerate(machine.visible_gpus)
        }
        self._known: dict[tuple[int, ...], _Spread] = {}

    def placed(self, counts: Sequence[int]) -> dict[str, int | str]:
        return place_groups(self._architecture, self._groups, counts)

    def first(self) -> tuple[int, ...]:
        """By weights, cache and contexts alone."""
        return self._partition(self._contexts)

    def started(self) -> _Spread:
        """The best of a few exact partitions, each for what the one before held beside."""
        base, counts = dict(self._contexts), self.first()
        for _ in range(ROUNDS):
            if counts in self._known:
                break  # what each GPU holds beside follows from the counts
            spread = self._replayed(counts)
            for i, need in spread.needs.items():
                first = sum(counts[:i])
                base[i] = need - sum(self._sizes[first : first + counts[i]])
            counts = self._partition(base)
        return min(self._known.values(), key=lambda spread: max(spread.shares))

    def settled(self, spread: _Spread) -> _Spread:
        """Where no move of one group off the fullest GPU helps."""
        better: _Spread | None = spread
        while better is not None:
            spread = better
            rank = spread.rank
            better = next((one for one in self._moved(spread) if one.rank < rank), None)
        return spread

    def _moved(self, spread: _Spread) -> Iterator[_Spread]:
        """One group less on the fullest GPU, one more on another, those between them shifted."""
        shares, counts = spread.shares, spread.counts
        fullest = max(range(len(shares)), key=shares.__getitem__)
        for to in sorted(range(len(shares)), key=shares.__getitem__):
            if self._free[to] <= 0 or shares[to] >= shares[fullest]:
                continue
            moved = list(counts)
            moved[fullest] -= 1
            moved[to] += 1
            yield self._replayed(tuple(moved))

    def _partition(self, base: Mapping[int, int]) -> tuple[int, ...]:
        cards = [Card(free_bytes=free, base_bytes=base[i]) for i, free in enumerate(self._free)]
        return tuple(contiguous(self._sizes, cards))

    def _replayed(self, counts: tuple[int, ...]) -> _Spread:
        if counts not in self._known:
            made = Predictor(self._architecture, self.placed(counts), self._machine)
            plan = made.plan(**self._size, placement="balanced")
            needs = {int(d.device.removeprefix("cuda:")): d.peak_bytes for d in plan.devices}
            self._known[counts] = _Spread(
                counts=counts,
                needs=needs,
                shares=tuple(
                    needs[i] / free if i in needs else 0.0 for i, free in enumerate(self._free)
                ),
            )
        return self._known[counts]
