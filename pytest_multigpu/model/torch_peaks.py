"""torch's own peaks of a stretch of time, kept although stretches within it reset them.

torch keeps one peak for each device and is imported inside functions. Every call names its device.
"""

from __future__ import annotations

from collections.abc import Sequence

_open: list[TorchPeaks] = []
"""Stretches that have begun and not ended, in this process."""


class TorchPeaks:
    """Peaks from now until :meth:`close`. CUDA must be initialised."""

    def __init__(self, indices: Sequence[int]) -> None:
        """:param indices: CUDA indices; their peaks are reset."""
        import torch

        keep_open_peaks()
        self._largest: dict[int, tuple[int, int]] = dict.fromkeys(indices, (0, 0))
        for index in indices:
            torch.cuda.reset_peak_memory_stats(index)
        _open.append(self)

    def close(self) -> dict[int, tuple[int, int]]:
        """CUDA index to the largest allocated and reserved bytes."""
        self.keep()
        _open.remove(self)
        return dict(self._largest)

    def keep(self) -> None:
        """What torch has counted since the last reset."""
        import torch

        for index, (allocated, reserved) in self._largest.items():
            self._largest[index] = (
                max(allocated, torch.cuda.max_memory_allocated(index)),
                max(reserved, torch.cuda.max_memory_reserved(index)),
            )


def keep_open_peaks() -> None:
    """Before anybody resets torch's peaks."""
    for stretch in _open:
        stretch.keep()
