"""Peaks and leftovers: torch's allocator per device, NVML as second witness, RSS for ``cpu``.

May import records and siblings; torch in functions. Every CUDA call names its device; no context
is made on a GPU that the process does not use.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..records.memory import Leftover
from ..records.model import PeakReading, PhasePeaks
from .torch_caches import give_back_cached
from .torch_peaks import TorchPeaks
from .witness import Sampler, Witness, cuda_ready, has_context, index_of

LEAK_SAMPLES = 3


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
        """Phases may lie within one another, also those of other meters."""
        witness = self._witness = self._witness or Witness(self.devices)
        largest: dict[str, int | None] = dict.fromkeys(self.devices)

        def sample() -> bool:
            for device in self.devices:
                used = witness.read(device)
                if used is not None:
                    largest[device] = max(used, largest[device] or 0)
            return any(value is not None for value in largest.values())

        indices = [index_of(device) for device in self.devices if device != "cpu"]
        peaks = TorchPeaks(indices) if indices and cuda_ready() else None
        measured = Measured(phase)
        sampler = Sampler(sample)
        sampler.start()
        try:
            yield measured
        finally:
            sampler.finish()
            torch_peaks = {} if peaks is None else peaks.close()
            measured.peaks = PhasePeaks(
                phase=phase,
                readings=tuple(
                    _reading(device, largest[device], torch_peaks)
                    for device in self.devices
                    if device == "cpu" or peaks is not None
                ),
            )
            self.phases.append(measured.peaks)


class LeakMeter:
    """What remains on each device once garbage is collected and caches are given back."""

    def __init__(self, witness: Witness) -> None:
        """Reads the state before.

        :param witness: the one that watches over the test, so that it knows whose processes are
            whose when some have lost their parent.
        """
        self.devices = witness.devices
        self._witness = witness
        gpus = [device for device in self.devices if device != "cpu"]
        self._usable = bool(gpus) and cuda_ready()
        self._contexts = {device: has_context(index_of(device)) for device in gpus}
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
                by_torch=device == "cpu" or self._usable,
                had_context=self._contexts.get(device, True),
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
                used = self._used(device)
                live = used or 0 if device == "cpu" else allocated_bytes(device)
                now = live, used
                old = least.get(device, now)
                both = None if used is None or old[1] is None else min(old[1], used)
                least[device] = min(old[0], now[0]), both
        return least

    def _used(self, device: str) -> int | None:
        if device == "cpu":
            return self._witness.read(device)
        shares = self._witness.shares(device)
        return None if shares is None else shares.mine_bytes


def give_back() -> None:
    """Collect garbage and return cached device memory. Makes no CUDA context."""
    gc.collect()
    give_back_cached()


def _reading(
    device: str, used: int | None, torch_peaks: Mapping[int, tuple[int, int]]
) -> PeakReading:
    if device == "cpu":
        size = used or 0
        return PeakReading(
            device=device, allocated_bytes=size, reserved_bytes=size, used_bytes=used
        )
    allocated, reserved = torch_peaks[index_of(device)]
    return PeakReading(
        device=device, allocated_bytes=allocated, reserved_bytes=reserved, used_bytes=used
    )


def allocated_bytes(device: str) -> int:
    """In live tensors of this process on ``cuda:<index>``; 0 while CUDA is not initialised."""
    import torch

    cuda: Any = torch.cuda  # partly untyped
    return int(cuda.memory_allocated(index_of(device))) if cuda.is_initialized() else 0
