"""What went wrong while loading, as the one error to show, and letting go of what it holds.

May import errors and units; torch in functions.
"""

from __future__ import annotations

import errno
import os
import re
import traceback

from ..errors import LoadError, MultiGpuError
from ..units import human_size


def problem(error: BaseException, noted: BaseException | None, name: str) -> BaseException:
    """The one error to show for ``error``; an interrupt stays what it is.

    :param noted: what really went wrong, where transformers only logged it.
    :param name: the model's.
    """
    if not isinstance(error, Exception):
        return error
    cause = noted if isinstance(noted, Exception) else error
    if isinstance(cause, MultiGpuError):
        return cause
    if _is_out_of_memory(cause):
        return LoadError(out_of_memory(cause))
    if _is_out_of_host_memory(cause):
        return LoadError(_out_of_host_memory(cause, name))
    text = " ".join(str(cause).split())
    return LoadError(f"{name}: {type(cause).__name__} while loading: {text[:500]}")


def let_go(error: BaseException) -> None:
    """Empty the frames of ``error`` and of all that led to it: they hold the half-loaded model."""
    waiting: list[BaseException | None] = [error]
    seen: set[int] = set()
    while waiting:
        each = waiting.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        traceback.clear_frames(each.__traceback__)
        waiting += [each.__cause__, each.__context__]


def _is_out_of_memory(error: Exception) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError) or "CUDA out of memory" in str(error)


def _is_out_of_host_memory(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or os.strerror(errno.ENOMEM) in str(error)


def _out_of_host_memory(error: Exception, name: str) -> str:
    """torch says: DefaultCPUAllocator: can't allocate memory: you tried to allocate 8388608 bytes.
    Error code 12 (Cannot allocate memory). Or: unable to mmap 1172321704 bytes from file <...>:
    Cannot allocate memory (12)."""
    tried = re.search(r"(?:tried to allocate|unable to mmap) (\d+) bytes", str(error))
    wanted = f": {human_size(int(tried.group(1)))} wanted" if tried else ""
    return (
        f"{name}: the host is out of memory while loading{wanted}; place every layer on a GPU "
        "(--gpu-plan shows what is on cpu), or free the host's memory"
    )


def out_of_memory(error: Exception) -> str:
    """torch says: Tried to allocate 448.00 MiB. GPU 1 has a total capacity of 79.18 GiB of which
    12.00 MiB is free."""
    text = " ".join(str(error).split())
    tried = re.search(r"Tried to allocate ([\d.]+ \w+)", text)
    gpu = re.search(r"GPU (\d+)", text)
    free = re.search(r"of which ([\d.]+ \w+) is free", text)
    where = f"GPU {gpu.group(1)}: " if gpu else ""
    wanted = f": {tried.group(1)} wanted" if tried else ""
    left = f", {free.group(1)} free" if free else ""
    return (
        f"{where}out of memory while loading{wanted}{left}; plan for the free memory or free it "
        "(nvidia-smi shows who holds it)"
    )
