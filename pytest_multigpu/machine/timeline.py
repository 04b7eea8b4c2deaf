"""VRAM in use over the run, from NVML, for the plot in the report.

Imports records and :mod:`.nvml`. Creates no CUDA context.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping

from ..records.report import VramSample
from .nvml import NvmlLike, open_nvml, read_memory

INTERVAL_SECONDS = 0.2
MOST_SAMPLES = 3000
"""Of each GPU: then every other one is dropped and the interval doubles."""


class Timeline:
    """Samples in a daemon thread until stopped; a GPU that cannot be read has gaps."""

    def __init__(
        self,
        devices: Mapping[int, str],
        *,
        interval: float = INTERVAL_SECONDS,
        most: int = MOST_SAMPLES,
        nvml: NvmlLike | None = None,
    ) -> None:
        """:param devices: NVML index to ``cuda:<CUDA index>``."""
        self._devices = dict(devices)
        self._interval = interval
        self._most = most
        self._nvml = nvml
        self._rows: list[tuple[float, tuple[int | None, ...]]] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._run, name="pytest-multigpu-timeline", daemon=True
        )
        self._began = time.monotonic()

    def start(self, began: float) -> None:
        """:param began: ``time.monotonic()`` at the start of the run: second 0."""
        self._began = began
        self._thread.start()

    def stop(self) -> None:
        """A thread caught in a hung driver is left behind."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(2.0)

    def samples(self) -> tuple[VramSample, ...]:
        """What was seen so far, by time."""
        with self._lock:
            rows = list(self._rows)
        return tuple(
            VramSample(seconds=round(seconds, 3), device=device, used_bytes=used)
            for seconds, row in rows
            for device, used in zip(self._devices.values(), row, strict=True)
            if used is not None
        )

    def _run(self) -> None:
        try:
            binding = open_nvml(self._nvml)
        except Exception:  # no NVML: the plot stays empty, as the report says of the machine
            return
        while True:
            seconds = time.monotonic() - self._began
            row = tuple(_used(binding, index) for index in self._devices)
            with self._lock:
                self._rows.append((seconds, row))
                if len(self._rows) >= self._most:
                    self._rows = self._rows[::2]
                    self._interval *= 2
            if self._stop.wait(self._interval):
                return


def _used(nvml: NvmlLike, index: int) -> int | None:
    try:
        return read_memory(nvml, nvml.nvmlDeviceGetHandleByIndex(index))[2]
    except nvml.NVMLError:
        return None
