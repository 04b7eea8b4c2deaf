"""The longest context under the balanced placement, which moves layers as the cache grows.

Imports records and its own part.
"""

from __future__ import annotations

from collections.abc import Callable

from ..records.machine import Machine
from ..records.plan import Architecture, Plan
from .fit import LONGEST, PRECISION, largest_context

Spread = Callable[[Architecture, Machine, int, int], "Plan | None"]
"""The balanced plan for a context and batch; None where no GPU has a free byte."""

ROUNDS = 3
"""At most: balance for a context, find the longest that fits as placed, balance for that."""


def longest_balanced(
    architecture: Architecture,
    machine: Machine,
    *,
    batch: int,
    near: int,
    known: int = 0,
    most: int | None = None,
    spread: Spread,
) -> Plan | None:
    """The balanced plan of the longest context found that fits; None if none was.

    :param near: the context to begin with.
    :param known: fits, placed in another way: begin there if what was found is shorter.
    :param most: no longer one is looked for; beside that the model's positions are the end.
    """
    end = min(most or LONGEST, architecture.max_context or LONGEST)
    found: set[int] = set()

    def look(tokens: int) -> None:
        longest = 0
        for _ in range(ROUNDS):
            made = spread(architecture, machine, max(1, tokens), batch)
            if made is None:
                return
            fits = made.context_tokens if made.fits else 0
            tokens = largest_context(
                architecture,
                made.device_map,
                machine,
                batch=batch,
                known=fits,
                weights=made.weights,
            )
            tokens = min(end, tokens)
            found.update((fits, tokens))
            if tokens <= longest + longest // PRECISION:
                return
            longest = tokens

    def longest_found() -> Plan | None:
        for tokens in sorted(found - {0}, reverse=True):
            made = spread(architecture, machine, tokens, batch)
            if made is not None and made.fits:
                return made
        return None

    look(min(near, end))
    made = longest_found()
    if (0 if made is None else made.context_tokens) < min(known, end):
        look(min(known, end))
        made = longest_found()
    return made
