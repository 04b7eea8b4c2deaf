"""The largest number of tokens that fits, in few tries. Imports the standard library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How a context fits."""

    fits: bool
    """As its plan would say."""
    spare_bytes: int
    """About what the tightest GPU has left; below 0: what it lacks. Near 0 its sign may differ
    from ``fits``."""


def last_that_fits(
    fit: Callable[[int], Fit],
    low: tuple[int, int],
    high: tuple[int, int | None],
    *,
    precision: int,
    step: int = 16,
) -> int:
    """A number that fits, with one that does not at most ``step``, or 1 part in ``precision``,
    above it.

    Regula falsi: what is left is nearly linear in the tokens, so the line through both ends points
    at the answer, and aiming half the precision above and below it in turn closes the bracket.
    Where the allocator's steps defeat that twice in a row the middle is tried, so that it never
    takes more than thrice the tries of bisection.

    :param low: tokens that fit, and their spare bytes.
    :param high: tokens that do not, and what they lack, below 0; None if it is not known.
    """
    (short, left), (long, lacking) = low, (high[0], high[1] or 0)
    before, slow = False, 0
    while (width := long - short) > (near := max(step, short // precision)):
        guess = short + width // 2
        if left > 0 > lacking and slow < 2:
            aim = short + width * left // (left - lacking) + (near // 2 if before else -near // 2)
            guess = min(max(aim, short + near), long - near)
            slow += 1
        else:
            slow = 0
        found = fit(guess)
        if found.fits:
            short, left = guess, found.spare_bytes
            # An end that stays twice pulls less (Illinois): else the other one creeps.
            lacking = lacking // 2 if before else lacking
        else:
            long, lacking = guess, found.spare_bytes
            left = left if before else left // 2
        before = found.fits
        if long - short <= width // 2:
            slow = 0
    return short
