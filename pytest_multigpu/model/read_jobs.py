"""What the reader reads and where it puts it: one job a tensor, scratch slots, raw memory.

Imports the sibling index; torch in functions.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .safetensors_index import TORCH_DTYPE, StoredTensor


@dataclass(eq=False)
class ReadJob:
    """One tensor to read."""

    stored: StoredTensor
    device: Any
    """``torch.device``."""
    quantised: bool
    """Goes through a scratch slot of its device instead of staying where it lands."""
    tensor: Any = None
    """Set once it has a place; ``torch.Tensor`` of the stored dtype and shape."""
    slot: int | None = None
    left_bytes: int = 0
    ready: threading.Event = field(default_factory=threading.Event)


class PendingTensor:
    """Stands for a tensor that is being read; answers as a safetensors slice does."""

    def __init__(self, job: ReadJob, wait: Callable[[ReadJob], Any]) -> None:
        self._job, self._wait = job, wait

    def get_shape(self) -> list[int]:
        return list(self._job.stored.shape)

    def get_dtype(self) -> str:
        return self._job.stored.dtype

    def __getitem__(self, key: Any) -> Any:
        return self._wait(self._job)[key]


class Lane:
    """Scratch slots of one device, handed out in the order of the jobs."""

    def __init__(self, device: Any, slot_bytes: int, count: int) -> None:
        self.waiting: deque[ReadJob] = deque()
        self.buffers = [memory(slot_bytes, device) for _ in range(count)]
        self.free = deque(range(count))
        self.after: list[Any] = [None] * count
        """Per slot: the event after which it may be overwritten."""


def memory(size_bytes: int, device: Any) -> Any:
    import torch

    return torch.empty(size_bytes, dtype=torch.uint8, device=device)


def pinned_memory(size_bytes: int) -> Any:
    import torch

    return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)


def bytes_of(flat: Any) -> memoryview:
    """The memory of a uint8 tensor on the host."""
    return memoryview(flat.numpy())


def typed(flat: Any, stored: StoredTensor) -> Any:
    import torch

    return flat.view(getattr(torch, TORCH_DTYPE[stored.dtype])).view(stored.shape)


def flat_bytes(tensor: Any) -> Any:
    import torch

    return tensor.view(-1).view(torch.uint8)
