"""The worker's side of the wire: one JSON object a line, flushed at once. Standard library only.

::

    {"event": "start",  "step": "copies", "gpus": [0, 1, 2, 3], "at": 1769000000.0}
    {"event": "at",     "step": "copies", "gpus": [0, 1], "path": true}
    {"event": "left",   "step": "contexts", "gpu": 2}
    {"event": "result", "kind": "pair", "value": {...}}
    {"event": "unmeasured", "step": "copies", "gpus": [2], "reason": "..."}
    {"event": "end",    "step": "copies", "seconds": 0.15}
    {"event": "failed", "step": "copies", "gpus": [1], "reason": "RuntimeError: ..."}
    {"event": "done"}
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TextIO, TypeVar

T = TypeVar("T")


class GpuError(Exception):
    """An exception on one known GPU or on the way between two."""

    def __init__(self, gpus: Sequence[int], cause: BaseException) -> None:
        super().__init__(one_line(cause))
        self.gpus = tuple(gpus)


def one_line(error: BaseException) -> str:
    """``RuntimeError: CUDA error: an illegal memory access was encountered``."""
    text = str(error).strip()
    first = text.splitlines()[0] if text else ""
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


class Emitter:
    """Writes events from any thread; remembers which step is open."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._lock = threading.Lock()
        self.step_name = ""

    def emit(self, event: str, **fields: object) -> None:
        line = json.dumps({"event": event, **fields}) + "\n"
        with self._lock:
            self._out.write(line)
            self._out.flush()

    def result(self, kind: str, /, **value: object) -> None:
        self.emit("result", kind=kind, value=value)

    def at(self, *gpus: int, path: bool = False) -> None:
        """The step now works on these GPUs only; ``path``: from the first on to the last."""
        self.emit("at", step=self.step_name, gpus=list(gpus), path=path)

    def unmeasured(self, gpus: Sequence[int], reason: str) -> None:
        self.emit("unmeasured", step=self.step_name, gpus=list(gpus), reason=reason)

    @contextmanager
    def step(self, name: str, gpus: Sequence[int] = ()) -> Iterator[None]:
        self.step_name = name
        began = time.perf_counter()
        self.emit("start", step=name, gpus=list(gpus), at=time.time())
        yield
        self.emit("end", step=name, seconds=round(time.perf_counter() - began, 6))

    def each(self, gpus: Sequence[int], work: Callable[[int], T]) -> list[T]:
        """``work(gpu)`` for all GPUs at once, a thread each; results in the order of ``gpus``.

        :raises GpuError: the first failure, naming its GPU.
        """

        def one(gpu: int) -> T:
            try:
                value = work(gpu)
            except Exception as error:
                raise GpuError([gpu], error) from error
            self.emit("left", step=self.step_name, gpu=gpu)
            return value

        if not gpus:
            return []
        with ThreadPoolExecutor(max_workers=len(gpus)) as pool:
            return list(pool.map(one, gpus))
