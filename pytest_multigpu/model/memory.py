"""Peaks and leftovers: torch's allocator per device, NVML as second witness, RSS for ``cpu``.

May import records and siblings; torch, pynvml and psutil in functions. Every CUDA call names its
device; no context is made on a GPU that the process does not use.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

from ..records.memory import Leftover
from ..records.model import PeakReading, PhasePeaks

INTERVAL_SECONDS = 0.02
"""Between NVML readings. The allocator's reserve only grows within a phase, so the reading at the
end of the phase counts most; the thread catches what comes and goes."""
SHARE = 0.005
"""At most this share of the time goes into reading: slow drivers are asked less often."""
LEAK_SAMPLES = 3


class Witness:
    """Bytes in use as someone other than torch sees them: NVML for GPUs, RSS for ``cpu``."""

    def __init__(self, devices: Sequence[str]) -> None:
        """:param devices: ``cuda:<CUDA index>`` or ``cpu``."""
        self.devices = tuple(devices)
        self._handles: dict[str, Any] = {}
        self._nvml: Any = None
        indices = [_index(device) for device in devices if device != "cpu"]
        if indices and _cuda_ready():
            self._join(indices)

    def _join(self, indices: Sequence[int]) -> None:
        """NVML index is not CUDA index: join by UUID."""
        import torch

        try:
            import pynvml
        except ImportError:
            return
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError:
            return
        self._nvml = pynvml
        weakref.finalize(self, _shutdown, pynvml)
        for index in indices:
            uuid = str(getattr(torch.cuda.get_device_properties(index), "uuid", ""))
            with contextlib.suppress(pynvml.NVMLError):
                self._handles[f"cuda:{index}"] = pynvml.nvmlDeviceGetHandleByUUID(
                    uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
                )

    def read(self, device: str) -> int | None:
        """Bytes in use now; None if nobody can say."""
        if device == "cpu":
            return _resident_bytes()
        handle = self._handles.get(device)
        if handle is None:
            return None
        try:
            # The second version keeps the driver's own reserve out of ``used``.
            memory = self._nvml.nvmlDeviceGetMemoryInfo(handle, version=self._nvml.nvmlMemory_v2)
        except self._nvml.NVMLError:
            return None
        return int(memory.used)


class Measured:
    """Filled when the ``with`` block of :meth:`PeakMeter.measure` ends."""

    def __init__(self, phase: str) -> None:
        self.peaks = PhasePeaks(phase=phase)


class PeakMeter:
    """Peaks of named phases on the given devices.

    ::

        with meter.measure("decode") as measured:
            ...
        measured.peaks.readings[0].allocated_bytes

    For ``cpu`` all three figures are the largest resident size of this process.
    """

    def __init__(self, devices: Sequence[str], phases: list[PhasePeaks] | None = None) -> None:
        """:param phases: a list to add to, such as the session's."""
        self.devices = tuple(devices)
        self.phases: list[PhasePeaks] = [] if phases is None else phases
        """Every phase measured so far, those whose block raised included."""
        self._witness: Witness | None = None

    @contextlib.contextmanager
    def measure(self, phase: str) -> Iterator[Measured]:
        """Phases of one process must not overlap: torch keeps one peak for each device."""
        if self._witness is None:
            self._witness = Witness(self.devices)
        indices = [_index(device) for device in self.devices if device != "cpu"]
        ready = bool(indices) and _cuda_ready()
        if ready:
            import torch

            for index in indices:
                torch.cuda.reset_peak_memory_stats(index)
        measured = Measured(phase)
        sampler = _Sampler(self._witness)
        sampler.start()
        try:
            yield measured
        finally:
            used = sampler.finish()
            measured.peaks = PhasePeaks(
                phase=phase,
                readings=tuple(
                    _reading(device, used[device])
                    for device in self.devices
                    if device == "cpu" or ready
                ),
            )
            self.phases.append(measured.peaks)


class LeakMeter:
    """What remains on each device once garbage is collected and caches are given back."""

    def __init__(self, devices: Sequence[str]) -> None:
        """Reads the state before."""
        self.devices = tuple(devices)
        self._witness = Witness(self.devices)
        self._before = self._settled()

    def leftover(self) -> tuple[Leftover, ...]:
        """Reads the state after, several times; the least counts, since freeing takes a moment."""
        after = self._settled()
        return tuple(
            Leftover(
                device=device,
                before_bytes=self._before[device][0],
                after_bytes=after[device][0],
                used_before_bytes=self._before[device][1],
                used_after_bytes=after[device][1],
            )
            for device in self.devices
        )

    def _settled(self) -> dict[str, tuple[int, int | None]]:
        least: dict[str, tuple[int, int | None]] = {}
        for sample in range(LEAK_SAMPLES):
            if sample:
                time.sleep(0.01)
            give_back()
            for device in self.devices:
                used = self._witness.read(device)
                now = _allocated(device, used), used
                old = least.get(device, now)
                both = None if used is None or old[1] is None else min(old[1], used)
                least[device] = min(old[0], now[0]), both
        return least


def give_back() -> None:
    """Collect garbage and return cached device memory. Makes no CUDA context."""
    import torch

    gc.collect()
    cuda: Any = torch.cuda  # partly untyped
    if cuda.is_available() and cuda.is_initialized():
        cuda.empty_cache()


class _Sampler:
    """The largest reading of each device between ``start`` and ``finish``."""

    def __init__(self, witness: Witness) -> None:
        self._witness = witness
        self._largest: dict[str, int | None] = dict.fromkeys(witness.devices)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="peak-meter", daemon=True)

    def start(self) -> None:
        self._sample()
        if any(value is not None for value in self._largest.values()):
            self._thread.start()

    def finish(self) -> dict[str, int | None]:
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._sample()
        return self._largest

    def _run(self) -> None:
        pause = INTERVAL_SECONDS
        while not self._stop.wait(pause):
            started = time.perf_counter()
            self._sample()
            pause = max(INTERVAL_SECONDS, (time.perf_counter() - started) / SHARE)

    def _sample(self) -> None:
        for device in self._witness.devices:
            used = self._witness.read(device)
            if used is not None:
                self._largest[device] = max(used, self._largest[device] or 0)


def _reading(device: str, used: int | None) -> PeakReading:
    if device == "cpu":
        size = used or 0
        return PeakReading(
            device=device, allocated_bytes=size, reserved_bytes=size, used_bytes=used
        )
    import torch

    index = _index(device)
    return PeakReading(
        device=device,
        allocated_bytes=torch.cuda.max_memory_allocated(index),
        reserved_bytes=torch.cuda.max_memory_reserved(index),
        used_bytes=used,
    )


def _allocated(device: str, used: int | None) -> int:
    if device == "cpu":
        return used or 0
    import torch

    # 0 while CUDA is not initialised: then this process has nothing there.
    cuda: Any = torch.cuda  # partly untyped
    return int(cuda.memory_allocated(_index(device))) if cuda.is_initialized() else 0


def _index(device: str) -> int:
    return int(device.partition(":")[2])


def _cuda_ready() -> bool:
    """Initialise CUDA: peaks can't be reset before. Makes the allocators, but no context."""
    import torch

    if not torch.cuda.is_available():
        return False
    cuda: Any = torch.cuda  # partly untyped
    cuda.init()
    return True


def _resident_bytes() -> int | None:
    try:
        psutil: Any = importlib.import_module("psutil")  # accelerate brings it
    except ImportError:
        return None
    return int(psutil.Process().memory_info().rss)


def _shutdown(nvml: Any) -> None:
    with contextlib.suppress(nvml.NVMLError):
        nvml.nvmlShutdown()
