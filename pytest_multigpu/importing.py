"""Importing what is large without paying for it more than once. Imports nothing of the package."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection meanwhile: importing transformers makes a third of a million objects
    that stay, and walking them again and again is a quarter of the time that it takes."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def keep_for_good() -> None:
    """What is there now stays to the end: no collection walks it any more, nor does the
    interpreter's farewell. For a process in which nobody else's objects could be meant."""
    gc.freeze()
