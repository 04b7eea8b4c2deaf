"""What torch's allocator keeps of freed GPU memory goes back to the driver. Makes no context.

Imports nothing of the package; torch in functions.
"""

from __future__ import annotations

from typing import Any


def devices_in_use() -> list[int]:
    """CUDA indices on which this process has memory. The others must not get a context."""
    cuda = _cuda()
    if not cuda.is_available() or not cuda.is_initialized():
        return []
    return [index for index in range(cuda.device_count()) if cuda.memory_reserved(index)]


def give_back_cached() -> None:
    """``torch.cuda.empty_cache()`` on every GPU in use, once each has done its work.

    Expandable segments are unmapped after waiting for the current GPU, whichever they are on
    (https://github.com/pytorch/pytorch/issues/196258, torch 2.11 among others): what another one
    still computed with would be gone, "an illegal memory access".
    """
    if wait_for_devices():
        _cuda().empty_cache()


def wait_for_devices() -> list[int]:
    """Until every GPU in use has done its work; their CUDA indices."""
    indices = devices_in_use()
    for index in indices:
        _cuda().synchronize(index)
    return indices


def _cuda() -> Any:
    import torch

    return torch.cuda  # partly untyped
