"""With expandable segments the first allocation of a process must be alone."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

from pytest_multigpu.machine.cuda.backend import CudaBackend


class Torch:
    """Fails as torch 2.11 does if two GPUs allocate at once; contexts may be made at once."""

    def __init__(self) -> None:
        self.busy = threading.Lock()
        self.waiting = threading.Barrier(4)
        self.calls: list[str] = []
        self.cuda = SimpleNamespace(synchronize=self.synchronize)

    def device(self, kind: str, gpu: int) -> str:
        return f"{kind}:{gpu}"

    def synchronize(self, gpu: int) -> None:
        self.calls.append(f"context {gpu}")
        if len(self.calls) <= 4:
            self.waiting.wait(timeout=10)  # broken unless all four come at once

    def empty(self, _size: int, *, device: str) -> None:
        if not self.busy.acquire(blocking=False):
            raise RuntimeError("CUDA driver error: operation not permitted")
        time.sleep(0.01)
        self.calls.append(f"memory on {device}")
        self.busy.release()


def test_contexts_at_once_and_first_allocations_one_by_one() -> None:
    backend: Any = CudaBackend()
    backend._torch = torch = Torch()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(backend.open, range(4)))
    assert sorted(call for call in torch.calls if "memory" in call) == [
        f"memory on cuda:{gpu}" for gpu in range(4)
    ]
