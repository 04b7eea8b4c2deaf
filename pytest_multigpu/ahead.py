"""What a load needs, made ready while the CUDA worker still measures. Knows no pytest.

Imports take longer than all that the worker does, and contexts take seconds. What fails here is
the load's to tell: it does the same again.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from .errors import MultiGpuError
from .importing import keep_for_good

if TYPE_CHECKING:
    from .model.config import ResolvedModel
    from .records.plan import Plan
    from .worker_run import WorkerRun


def import_ahead(resolved: ResolvedModel, *, for_good: bool) -> None:
    """Import what loading this model takes.

    :param for_good: nobody else's tests are in this process, see :func:`.keep_for_good`.
    """
    with suppress(ImportError, MultiGpuError):
        from .model.loading import import_all

        import_all(resolved)
        if for_good:
            keep_for_good()


class Contexts:
    """A context on every GPU of a plan, made in a thread as soon as the worker's own are gone."""

    def __init__(self, worker: WorkerRun, plan: Plan) -> None:
        # Here, since the thread must not hold what others import.
        from .model.loading import wake_devices

        self._wake_devices = wake_devices
        self._worker = worker
        self._plan = plan
        # One may hang, and then so must the load, which is watched; not the end of the run.
        self._thread = threading.Thread(
            target=self._make, name="pytest-multigpu-contexts", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Until they are there."""
        self._thread.join()

    def _make(self) -> None:
        if self._worker.report().failure is None:
            with suppress(ImportError, RuntimeError, MultiGpuError):
                self._wake_devices(self._plan.device_map)
