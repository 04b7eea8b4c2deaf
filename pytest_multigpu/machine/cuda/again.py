"""Speeds that are measured again where they stand out: a rented host is shared, and somebody
else's burst halves a copy of milliseconds. What is slow stays slow. Standard library only."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

K = TypeVar("K", bound=Hashable)

TURNS = 3
"""More turns, at most, for what is slow in every one of them."""
PAUSE_S = 0.05
"""Before each: longer than most bursts."""


def best_speeds(
    keys: Sequence[K],
    measure: Callable[[Sequence[K]], Sequence[float]],
    tell: Callable[[K, float], None],
    *,
    share: float,
) -> None:
    """Measure all, and those again that are below ``share`` of the best; the best of each counts.

    :param keys: GPUs, or pairs.
    :param measure: the speeds of some of them, in their order.
    :param tell: is told each speed at once, and what gets better of it.
    """
    best: dict[K, float] = {}
    doubtful = list(keys)
    for turn in range(1 + TURNS):
        if turn:
            time.sleep(PAUSE_S)
        for key, speed in zip(doubtful, measure(doubtful), strict=True):
            if speed > best.get(key, 0.0):
                best[key] = speed
                tell(key, speed)
        limit = share * max(best.values(), default=0.0)
        doubtful = [key for key in keys if best.get(key, 0.0) < limit]
        if not doubtful:
            return
