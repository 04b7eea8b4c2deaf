"""One run's facts, each found once and on demand: machine, worker, plan, model, probe.

Here the columns meet: pure planning is fed with what the adapters read. Knows no pytest, so
that it serves the fixtures, the hooks and ``--gpu-plan`` alike.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import LoadError, UsageError
from .options import Settings
from .planbook import PlanBook
from .records.machine import Machine
from .records.plan import TIERS, DeviceMap, Plan, Tier

if TYPE_CHECKING:
    from .model.loaded import LoadedModel
    from .model.loading import Progress
    from .probes.probe import Probe
    from .machine.worker import WorkerHandle
    from .records.worker import WorkerReport


class GpuSession:
    """Everything that a run knows. Not thread-safe; one for each process."""

    def __init__(self, settings: Settings, environ: Mapping[str, str] | None = None) -> None:
        self.settings = settings
        self.environ = os.environ if environ is None else environ
        self.on_progress: Callable[[Progress], None] | None = None
        self._worker: WorkerHandle | None = None
        self._worker_report: WorkerReport | None = None
        self._model: LoadedModel | None = None
        self._model_error: LoadError | None = None

    @cached_property
    def machine(self) -> Machine:
        """The GPUs, read through NVML before anything of ours touches them, or simulated.

        :raises UsageError: a ``--gpu-simulate`` spec that cannot be read.
        """
        if self.settings.simulate is not None:
            from .planning.simulate import simulate

            return simulate(self.settings.simulate, self.catalogue)
        if self.settings.tier == "cpu":
            return Machine()
        from .machine.nvml import read_machine

        return read_machine(self.environ)
