"""What a load needs, made ready while the CUDA worker still measures. Knows no pytest.

Imports take longer than all that the worker does, and contexts take seconds. What fails here is
the load's to tell: it does the same again.
"""

from __future__ import annotations

import threading
from collections.abc import Collection
from typing import TYPE_CHECKING

from .importing import keep_for_good

if TYPE_CHECKING:
    from .model.config import ResolvedModel
    from .worker_run import WorkerRun


def import_ahead(resolved: ResolvedModel, *, for_good: bool) -> None:
    """Import what loading this model takes.

    :param for_good: nobody else's tests are in this process, see :func:`.keep_for_good`.
    :raises UsageError: transformers knows no such model.
    """
    from .model.loading import import_all

    import_all(resolved)
    if for_good:
        keep_for_good()


class Contexts:
    """A context on each of some GPUs, made as soon as the worker's own are gone.

    By the driver, which needs no interpreter for it: torch's way would stop the imports meanwhile.
    """

    def __init__(self, worker: WorkerRun, gpus: Collection[int]) -> None:
        """:param gpus: CUDA indices."""
        from .machine.cuda.early import EarlyContexts

        self._worker = worker
        self._gpus = gpus
        self._early = EarlyContexts(gpus=gpus)
        # One may hang, and then so must the load, which is watched; not the end of the run.
        self._thread = threading.Thread(
            target=self._make, name="pytest-multigpu-contexts", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Until each is there or has failed, which the load then meets."""
        self._thread.join()
        self._early.wait_for_driver()
        for gpu in self._gpus:
            self._early.wait_for(gpu)

    def _make(self) -> None:
        if self._worker.report().failure is None:
            self._early.start()
