"""Contexts made through the driver while torch is still being imported.

Importing torch keeps one core busy for seconds; the driver needs about as long for the contexts
of four GPUs. torch then finds each GPU's primary context in place and uses it. Whatever fails
here is left for torch to meet, and to report, in its own words. Standard library only.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Collection
from typing import Any


def _libcuda() -> Any:
    return ctypes.CDLL("libcuda.so.1")


class EarlyContexts:
    """``start()``, import torch, ``wait_for_driver()``, then ``wait_for(gpu)`` for each GPU."""

    def __init__(
        self, library: Callable[[], Any] = _libcuda, *, gpus: Collection[int] | None = None
    ) -> None:
        """:param gpus: CUDA indices; by default all that CUDA sees."""
        self._library = library
        self._gpus = gpus
        self._contexts: dict[int, threading.Thread] = {}
        self._thread = threading.Thread(target=self._start_driver, daemon=True)

    def start(self) -> EarlyContexts:
        # As torch does before it starts CUDA; the driver reads it once.
        os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")
        self._thread.start()
        return self

    def wait_for_driver(self) -> None:
        """Until the driver has started; without a limit, the parent has one."""
        if self._thread.ident is not None:
            self._thread.join()

    def wait_for(self, gpu: int) -> None:
        """Until the context of this GPU is made or has failed; after ``wait_for_driver``."""
        thread = self._contexts.get(gpu)
        if thread is not None:
            thread.join()

    def _start_driver(self) -> None:
        try:
            cuda = self._library()
        except OSError:
            return  # no driver: torch says so
        count = ctypes.c_int(0)
        if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
            return
        for gpu in range(count.value):
            if self._gpus is not None and gpu not in self._gpus:
                continue
            thread = threading.Thread(target=self._retain, args=(cuda, gpu), daemon=True)
            self._contexts[gpu] = thread
            thread.start()

    @staticmethod
    def _retain(cuda: Any, gpu: int) -> None:
        device, context = ctypes.c_int(0), ctypes.c_void_p()
        if cuda.cuDeviceGet(ctypes.byref(device), gpu) == 0:
            cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
