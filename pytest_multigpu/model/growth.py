"""How far each GPU's memory goes up while a test runs: torch's peak, and NVML's growth.

NVML also sees what torch does not: other libraries, ``cudaMalloc``, processes that the test
starts. May import records and siblings; torch in functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..records.memory import Growth
from .memory import allocated_bytes, give_back
from .torch_peaks import TorchPeaks
from .witness import Sampler, Shares, Witness, cuda_ready, has_context, index_of


class GrowthMeter:
    """Of the GPUs of a witness, around one test."""

    def __init__(self, witness: Witness) -> None:
        self._witness = witness
        self.growths: tuple[Growth, ...] = ()
        """Filled when the ``with`` block of :meth:`measure` ends."""

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Caches are given back first: what the test then takes from the GPU is its own."""
        give_back()
        devices = self._witness.devices
        ready = cuda_ready()
        live = {device: allocated_bytes(device) if ready else 0 for device in devices}
        contexts = {device: has_context(index_of(device)) for device in devices}
        before = self._read()
        most = dict(before)

        def sample() -> bool:
            for device, now in self._read().items():
                known = most[device]
                if known is None or (now is not None and now.mine_bytes > known.mine_bytes):
                    most[device] = now
            return any(shares is not None for shares in most.values())

        peaks = TorchPeaks([index_of(device) for device in devices]) if ready else None
        sampler = Sampler(sample)
        sampler.start()
        try:
            yield
        finally:
            sampler.finish()
            torch_peaks = {} if peaks is None else peaks.close()
            self.growths = tuple(
                Growth(
                    device=device,
                    live_bytes=live[device],
                    had_context=contexts[device],
                    torch_bytes=torch_peaks.get(index_of(device), (None, None))[0],
                    grown_bytes=_difference(before[device], most[device]),
                    hidden_bytes=_hidden(most[device]),
                )
                for device in devices
            )

    def _read(self) -> dict[str, Shares | None]:
        return {device: self._witness.shares(device) for device in self._witness.devices}


def _difference(before: Shares | None, most: Shares | None) -> int | None:
    return None if before is None or most is None else most.mine_bytes - before.mine_bytes


def _hidden(shares: Shares | None) -> int:
    return 0 if shares is None else shares.hidden_bytes
