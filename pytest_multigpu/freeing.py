"""What a failed test still holds: its frames, and through them its tensors. Imports no torch."""

from __future__ import annotations

import sys
import traceback


def clear_failure(error: BaseException) -> None:
    """Drop the locals of every frame that an exception, its causes and its parts went through.

    A failed test's traceback lives as long as its report: with it would live the test's tensors.
    """
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        one = pending.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        traceback.clear_frames(one.__traceback__)
        pending += [one.__cause__, one.__context__, *getattr(one, "exceptions", ())]


def ran_out_of_memory(error: BaseException) -> bool:
    """Was it torch's allocator, on a GPU or (a RuntimeError there) on the CPU?"""
    name = type(error).__name__
    return name == "OutOfMemoryError" or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def give_back() -> None:
    """After an out-of-memory error: return torch's cached blocks, which may be in pieces.

    Without it the next test could find no block that is large enough although bytes are free.
    """
    if "torch" in sys.modules:
        from .model import memory

        memory.give_back()
