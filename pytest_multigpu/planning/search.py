"""The largest number of tokens that fits, in few tries. Imports the standard library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

LINES = 7
"""Tries by interpolation: two do where the line is straight."""


LOOKS = 4
"""Tries just above an answer."""

FURTHER = 20
"""One more is tried 1 part in that many above it."""


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
    high: tuple[int, int],
    *,
    precision: int,
    step: int = 16,
) -> int:
    """A number that fits, with one that does not at most ``step``, or 1 part in ``precision``,
    above it.

    Regula falsi: what is left is nearly linear in the tokens, so the line through both ends points
    at the answer, and aiming half the precision above and below it in turn closes the bracket.
    Where the allocator's steps make a fool of the line, the tries after ``LINES`` are bisection's.

    :param low: tokens that fit, and their spare bytes.
    :param high: tokens that do not, and theirs, below 0.
    """
    (short, left), (long, lacking) = low, high
    before: bool | None = None
    tries = 0
    while (width := long - short) > (near := max(step, short // precision)):
        tries += 1
        guess = short + width // 2
        if left > lacking and tries <= LINES:
            aim = short + width * left // (left - lacking) + (near if before else -near) // 2
            guess = min(max(aim, short + near), long - near)
        found = fit(guess)
        # An end that stays a second time pulls half as much (Illinois): else the other creeps.
        if found.fits:
            short, left = guess, found.spare_bytes
            lacking = lacking // 2 if before is True else lacking
        else:
            long, lacking = guess, found.spare_bytes
            left = left // 2 if before is False else left
        before = found.fits
    return short


def climbed(
    fit: Callable[[int], Fit], answer: int, *, below: int, precision: int, step: int = 16
) -> int:
    """The answer, or one above it that fits.

    What fits is not one stretch: where a segment just fails to be reused, a context does not fit
    and a somewhat longer one does. So ``LOOKS`` more are tried above the answer, and one that is
    ``FURTHER`` above it: that one never fits.

    :param below: is not asked about, nor what is above it.
    """
    while True:
        near = max(step, answer // precision)
        at, missed = answer, 0
        while missed < LOOKS and at + near < below:
            at += near
            if fit(at).fits:
                answer, missed = at, 0
            else:
                missed += 1
        further = answer + answer // FURTHER + 1
        if further >= below or not fit(further).fits:
            return answer
        answer = further
