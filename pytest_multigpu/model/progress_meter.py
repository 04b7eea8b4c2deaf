"""Counts the bytes of a load and tells whoever shows them. Imports records only."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from ..records.progress import Progress


class Meter:
    """Counts bytes from any thread and tells the listener, at most ten times a second."""

    def __init__(self, listener: Callable[[Progress], None] | None) -> None:
        self._listener = listener
        self._lock = threading.Lock()
        self._started = time.perf_counter()
        self._told = 0.0
        self.total_bytes = 0
        self.done_bytes = 0

    def start(self, total_bytes: int) -> None:
        self._started = time.perf_counter()
        self.total_bytes, self.done_bytes = total_bytes, 0

    def add(self, count: int) -> None:
        with self._lock:
            self.done_bytes += count
            now = time.perf_counter()
            last = self.done_bytes >= self.total_bytes
            if self._listener is None or (now - self._told < 0.1 and not last):
                return
            self._told = now
            moment = Progress(
                bytes_done=self.done_bytes,
                bytes_total=self.total_bytes,
                seconds=now - self._started,
            )
            self._listener(moment)
