"""What a load needs, made ready while the CUDA worker still measures. Knows no pytest.

Imports take longer than all that the worker does, and contexts take seconds. What fails here is
the load's to tell: it does the same again.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from .errors import MultiGpuError

if TYPE_CHECKING:
    from .model.config import ResolvedModel
    from .records.plan import Plan
    from .worker_run import WorkerRun


class Ahead:
    """Contexts in a thread, as soon as the worker's own are gone; imports at once."""

    def __init__(self, worker: WorkerRun, plan: Plan | None) -> None:
        """:param plan: its GPUs get a context each; None for none."""
        self._worker = worker
        self._plan = plan
        # A context may hang, and then so must the load, which is watched; not the end of the run.
        self._thread = threading.Thread(
            target=self._wake, name="pytest-multigpu-contexts", daemon=True
        )

    def start(self, resolved: ResolvedModel) -> None:
        """Import all that loading this model takes; the contexts may come meanwhile or later."""
        with suppress(ImportError, MultiGpuError):
            # Before the thread: it must not hold what this one imports.
            from .model.loading import import_all

            if self._plan is not None:
                self._thread.start()
            import_all(resolved)

    def finish(self) -> None:
        """Wait for the contexts."""
        if self._thread.ident is not None:
            self._thread.join()

    def _wake(self) -> None:
        from .model.loading import wake_devices

        if self._plan is not None and self._worker.report().failure is None:
            with suppress(ImportError, RuntimeError, MultiGpuError):
                wake_devices(self._plan.device_map)
