"""From two recordings of one situation to steps with formulas. Imports records.

The recordings differ in the numbers of tokens and sequences, all prime, so that the two sizes of
an allocation tell how it grows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from ..records.passes import LayerPass, Size, Step

if TYPE_CHECKING:
    from .recording import Event

SMALL = 16
"""Bytes for each token and sequence, up to which a tensor is left out."""
SMALL_FIXED = 1 << 16
"""Bytes of a tensor whose size does not depend on tokens, up to which it is left out."""


class UnclearError(Exception):
    """The two recordings do not tell what a pass takes."""


def formula(numbers: tuple[int, int], batches: tuple[int, int], tokens: tuple[int, int]) -> Size:
    """The formula that gives ``numbers`` for those batches and tokens: with one term if there is
    one, else with two.

    :raises UnclearError: there is none.
    """
    if numbers[0] == numbers[1]:
        return Size(numbers[0])
    (n, m), powers = tokens, (1, 0) if batches[0] != batches[1] else (0,)
    each = {
        power: (numbers[0] // batches[0] ** power, numbers[1] // batches[1] ** power)
        for power in powers
        if not any(number % b**power for number, b in zip(numbers, batches, strict=True))
    }
    for power, (a, b) in each.items():
        for degree in range(3):
            if a % n**degree == 0 and a // n**degree * m**degree == b:
                return _polynomial({degree: a // n**degree}, power)
    for power, (a, b) in each.items():
        for low, high in ((1, 2), (0, 1), (0, 2)):
            # a = x n^low + y n^high and b = x m^low + y m^high
            determinant = n**low * m**high - m**low * n**high
            x, no_x = divmod(a * m**high - b * n**high, determinant)
            y, no_y = divmod(n**low * b - m**low * a, determinant)
            if not no_x and not no_y and x > 0 and y > 0:
                return _polynomial({low: x, high: y}, power)
    raise UnclearError(f"no formula gives {numbers[0]} and {numbers[1]} bytes")


def _polynomial(terms: Mapping[int, int], power: int) -> Size:
    fixed, linear, square = (terms.get(degree, 0) for degree in range(3))
    return Size(fixed, linear, square, power)


class Parts:
    """The events by segment, as steps; what is small is left out."""

    def __init__(
        self, events: Sequence[Event], sizes: Sequence[Size], keep: Collection[int]
    ) -> None:
        self._events = list(zip(events, sizes, strict=True))
        self._segment: dict[int, int] = {}
        self.dropped: dict[int, int] = {}
        """Tensor to the segment in which it goes."""
        for event, size in self._events:
            if event.op == "drop":
                self.dropped[event.tensor] = event.segment
            elif event.op != "cache" and (
                event.tensor in keep or event.op != "take" or not _is_small(size)
            ):
                self._segment[event.tensor] = event.segment

    def taken_in(self, tensor: int, segment: int) -> bool:
        return self._segment.get(tensor) == segment

    def steps(self, *segments: int) -> tuple[Step, ...]:
        """Tensors of other segments are the caller's to drop."""
        return tuple(
            Step(event.op, event.tensor, size, event.rows, event.columns)
            for event, size in self._events
            if event.segment in segments
            and (event.op == "cache" or self._segment.get(event.tensor) in segments)
        )

    def layer(self, index: int, *, output: int, last: bool, inputs: tuple[Size, ...]) -> LayerPass:
        # What follows the last layer is the norm's part.
        segments = (2 * index + 1,) if last else (2 * index + 1, 2 * index + 2)
        steps = self.steps(*segments)
        alive = {step.tensor for step in steps if step.op not in ("drop", "cache")}
        alive -= {step.tensor for step in steps if step.op == "drop"}
        until = 2 * index + 4
        return LayerPass(
            steps=steps,
            output=output if output in alive else 0,
            late=tuple(
                sorted(t for t in alive - {output} if self.dropped.get(t, until + 1) <= until)
            ),
            inputs=inputs,
            kernels=sum(
                event.op != "drop" and event.segment in segments for event, _ in self._events
            ),
        )


def _is_small(size: Size) -> bool:
    if size.linear == size.square == size.batch_power == 0:
        return size.fixed <= SMALL_FIXED
    return max(size.fixed, size.linear) <= SMALL and not size.square
