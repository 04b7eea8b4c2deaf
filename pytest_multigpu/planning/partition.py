"""Partitions of a model's blocks over GPUs, in forward order, decided exactly for given sizes.

Embeddings stay on the first GPU used, norm and head on the last. Among all such partitions the one
with the smallest worst utilisation (need over free bytes) is taken, and among those the most even
one. Imports records.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from ..records.plan import Architecture, Block


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a GPU offers a partition."""

    free_bytes: int
    base_bytes: int = 0
    """Needed as soon as any block is on it: context, workspace, activations."""


def contiguous(sizes: Sequence[int], cards: Sequence[Card]) -> list[int]:
    """Items per card that minimise the largest ``(base + sizes) / free``; items stay in order.

    Dynamic programming over (cards, items), with exact integer comparisons; a card may stay
    empty, and one with no free bytes does. Among the optimal partitions the one with the
    smallest sum of squared utilisations is returned.

    :raises ValueError: no items, or no card with free bytes.
    """
    usable = [i for i, card in enumerate(cards) if card.free_bytes > 0]
    if not sizes or not usable:
        raise ValueError("nothing to place, or nowhere to place it")
    ends = [0, *accumulate(sizes)]
    worst = _smallest_worst(ends, [cards[i] for i in usable])
    counts = [0] * len(cards)
    for i, count in zip(usable, _most_even(ends, [cards[i] for i in usable], worst), strict=True):
        counts[i] = count
    return counts


_Ratio = tuple[int, int]


def _need(ends: Sequence[int], card: Card, start: int, stop: int) -> int:
    return card.base_bytes + ends[stop] - ends[start]


def _larger(one: _Ratio, other: _Ratio) -> _Ratio:
    return one if one[0] * other[1] >= other[0] * one[1] else other


def _smallest_worst(ends: Sequence[int], cards: Sequence[Card]) -> _Ratio:
    """The smallest possible worst utilisation, as ``(need, free)``."""
    count = len(ends) - 1
    nowhere: _Ratio = (1, 0)
    best: list[_Ratio] = [(0, 1)] + [nowhere] * count
    for card in cards:
        following = list(best)
        for stop in range(1, count + 1):
            # best[start] grows with start and this card's need shrinks: they cross once.
            low, high = 0, stop - 1
            while low < high:
                middle = (low + high) // 2
                need = _need(ends, card, middle, stop)
                if best[middle][0] * card.free_bytes >= need * best[middle][1]:
                    high = middle
                else:
                    low = middle + 1
            for start in {low, max(0, low - 1)}:
                worst = _larger(best[start], (_need(ends, card, start, stop), card.free_bytes))
                if _larger(following[stop], worst) is not worst:
                    following[stop] = worst
        best = following
    return best[count]


def _most_even(ends: Sequence[int], cards: Sequence[Card], worst: _Ratio) -> list[int]:
    """Counts with no utilisation above ``worst`` and the least sum of their squares."""
    count = len(ends) - 1
    best = [0.0] + [math.inf] * count
    taken: list[list[int]] = []
    for card in cards:
        following, starts = list(best), list(range(count + 1))
        for stop in range(1, count + 1):
            for start in range(stop - 1, -1, -1):
                need = _need(ends, card, start, stop)
                if need * worst[1] > worst[0] * card.free_bytes:
                    break
                total = best[start] + (need / card.free_bytes) ** 2
                if total < following[stop]:
                    following[stop], starts[stop] = total, start
        best = following
        taken.append(starts)
    counts, stop = [0] * len(cards), count
    for position in range(len(cards) - 1, -1, -1):
        start = taken[position][stop]
        counts[position], stop = stop - start, start
    return counts


def units(architecture: Architecture) -> list[list[Block]]:
    """Blocks grouped so that each group stays on one GPU, in forward order.

    Embeddings and what else comes before the first layer go with it, norm and head with the last;
    tied weights stay with their owner if that is in the same group, else the head has a copy.
    """
    layers = [i for i, block in enumerate(architecture.blocks) if block.kind == "layer"]
    if not layers:
        return [list(architecture.blocks)]
    groups = [[block] for block in architecture.blocks[layers[0] : layers[-1] + 1]]
    before, after = architecture.blocks[: layers[0]], architecture.blocks[layers[-1] + 1 :]
    # A rotary embedding may be listed last, but position ids come from the first GPU.
    groups[0] = [*before, *groups[0], *(block for block in after if block.kind == "other")]
    groups[-1] = [*groups[-1], *(block for block in after if block.kind != "other")]
    return groups


def place_groups(
    architecture: Architecture, groups: Sequence[Sequence[Block]], counts: Sequence[int]
) -> dict[str, int | str]:
    """The device map for ``counts`` groups on each GPU, in turn, blocks in forward order.

    Tied weights exist once: the block that shares them goes to their owner's GPU.
    """
    place: dict[str, int] = {}
    at = iter(groups)
    for index, count in enumerate(counts):
        for _ in range(count):
            place.update((block.name, index) for block in next(at))
    return {
        block.name: place.get(block.tied_to or block.name, place[block.name])
        for block in architecture.blocks
    }
