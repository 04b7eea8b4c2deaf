"""The CUDA worker of one run, and the thread that samples health while it loads the GPUs.

Knows no pytest.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .errors import MachineError
from .records.worker import STARTING, WorkerReport

if TYPE_CHECKING:
    from .machine.worker import WorkerHandle
    from .records.health import GpuHealth

WORKER_SECONDS = 90.0
"""Hard limit of the CUDA worker: a cold import of torch on a slow pod takes 40 of them."""


class WorkerRun:
    """Starts both at once; a worker that cannot be started is a report of that."""

    def __init__(self, visible: Sequence[int]) -> None:
        """:param visible: NVML indices of the GPUs whose health is sampled."""
        from .machine.health import Sampler
        from .machine.worker import start_worker

        self._handle: WorkerHandle | None = None
        self._unstarted: WorkerReport | None = None
        try:
            self._handle = start_worker(timeout_s=WORKER_SECONDS)
        except MachineError as error:
            self._unstarted = WorkerReport(failure=str(error), failed_step=STARTING)
        self._waiting = threading.Lock()
        self._sampler = Sampler(visible)
        self._sampler.start()

    def report(self) -> WorkerReport:
        """What the worker measured; waits for it. For any thread."""
        with self._waiting:
            if self._handle is None:
                assert self._unstarted is not None
                report = self._unstarted
            else:
                report = self._handle.result()
            self._sampler.stop()
            return report

    def health(self) -> tuple[GpuHealth, ...]:
        """Health of the GPUs, sampled until the worker had ended: so under load."""
        self.report()
        return self._sampler.result()

    def health_between(self, began: float, ended: float) -> tuple[GpuHealth, ...]:
        """The same of some seconds alone, by the clock of the worker's steps."""
        self.report()
        return self._sampler.between(began, ended)

    def close(self) -> None:
        """End both now."""
        if self._handle is not None:
            self._handle.close()
        self._sampler.stop()
