"""The CUDA driver's library, as far as contexts are made with it."""

from __future__ import annotations

import ctypes
import threading
from typing import Any


class FakeLibcuda:
    """Counts what it is asked; each function returns a CUresult."""

    def __init__(self, asked: list[str], count: int = 2, init: int = 0) -> None:
        self.asked = asked
        self.count = count
        self.init = init
        self.go = threading.Event()
        self.go.set()

    def cuInit(self, flags: int) -> int:  # noqa: N802
        self.asked.append("init")
        return self.init

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        ctypes.cast(count, ctypes.POINTER(ctypes.c_int))[0] = self.count
        return 0

    def cuDeviceGet(self, device: Any, gpu: int) -> int:  # noqa: N802
        ctypes.cast(device, ctypes.POINTER(ctypes.c_int))[0] = gpu + 10
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, device: Any) -> int:  # noqa: N802
        self.go.wait(10)
        self.asked.append(f"context {device.value}")
        return 2  # out of memory: torch will meet it again
