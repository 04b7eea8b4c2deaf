"""One run's facts, each found once and on demand: machine, worker, plan, model, probe.

Here the columns meet: pure planning is fed with what the adapters read. Knows no pytest, so
that it serves the fixtures, the hooks and ``--gpu-plan`` alike.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from .ahead import Contexts, import_ahead
from .closing import read_expected_skips
from .errors import MultiGpuError
from .given_files import read_catalogue
from .installed import installed_versions
from .options import Settings
from .planbook import PlanBook
from .records.machine import Machine
from .records.model import PhasePeaks
from .records.plan import Plan
from .records.progress import Progress
from .requirements import Wanted
from .waiting import held, would_help

if TYPE_CHECKING:
    from .judging.skips import ExpectedSkips
    from .model.loaded import LoadedModel
    from .model.memory import PeakMeter
    from .probes.probe import Probe
    from .records.drift import TextScores
    from .records.health import GpuHealth
    from .records.worker import WorkerReport
    from .worker_run import WorkerRun

_PACKAGES = ("torch", "transformers", "accelerate", "bitsandbytes", "pytest", "pytest-multigpu")


class GpuSession:
    """Everything that a run knows. Not thread-safe; one for each process."""

    def __init__(self, settings: Settings, environ: Mapping[str, str]) -> None:
        self.settings = settings
        self.environ = environ
        self.on_progress: Callable[[Progress], None] | None = None
        self.peaks: list[PhasePeaks] = []
        """Filled by the peak meters of this run, for the reports."""
        self.scores: TextScores | None = None
        """Of the text set, once they are there."""
        self.unsettled: str | None = None
        """Why the verdict has no plan to rest on, see :meth:`settle`."""
        self._worker: WorkerRun | None = None
        self._wanted = Wanted()
        self._model: LoadedModel | None = None
        self._model_error: MultiGpuError | None = None

    @cached_property
    def machine(self) -> Machine:
        """The GPUs, read through NVML before anything of ours touches them, or simulated.

        :raises UsageError: a ``--gpu-simulate`` spec that cannot be read.
        """
        if self.settings.simulate is not None:
            from .machine.torch_allocator import expandable_segments
            from .planning.simulate import simulate

            return replace(
                simulate(self.settings.simulate, read_catalogue(self.settings.catalogue)),
                expandable_segments=expandable_segments(self.environ),
            )
        from .machine.nvml import read_machine

        return read_machine(self.environ)

    @cached_property
    def plans(self) -> PlanBook:
        """The plans of this model on this machine, tier by tier."""
        return PlanBook(self.settings, self.machine, self.environ)

    @cached_property
    def expected_skips(self) -> ExpectedSkips | None:
        """The list of ``--gpu-expected-skips``; None without that option.

        :raises UsageError: it cannot be read.
        """
        return read_expected_skips(self.settings.expected_skips)

    @property
    def plan(self) -> Plan:
        """The plan that this run checks."""
        return self.plans.chosen

    @cached_property
    def versions(self) -> dict[str, str]:
        """Installed versions of what the figures depend on; absent packages are left out."""
        return installed_versions(*_PACKAGES)

    def start(self, wanted: Wanted) -> None:
        """Before the first test: read the machine, then let the CUDA worker run ahead.

        :raises UsageError: bad input that only the machine can tell, such as a device map that
            names a GPU that isn't there.
        """
        if wanted.plan:
            self.check_inputs()
        with _unwarned():
            self._wanted = wanted
            if not wanted.worker:
                self.end_worker()
            if self._real and self.machine.visible:
                self._wait_for_memory(wanted)
                if wanted.worker:
                    self._start_worker()

    def check_inputs(self) -> None:
        """:raises UsageError: the model or the device map cannot be what was meant."""
        with _unwarned():
            self.plans.check_inputs()

    def run_ahead(self) -> None:
        """Before collection, if the checks are what is asked for: start the worker, whose import
        of torch takes longest of all. Not while others hold memory: that is waited for first."""
        if self._real and self.machine.visible and not held(self.machine):
            self._start_worker()

    def end_worker(self) -> None:
        """End a worker that nobody waits for: it would go on beside people's own tests."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def settle(self) -> None:
        """Find what a verdict over checks rests on, the machine and the plan, if no check did."""
        try:
            if self.settings.tier != "cpu" and self.machine.visible:
                with _unwarned():
                    self.plan  # noqa: B018
        except MultiGpuError as error:
            self.unsettled = str(error)

    @property
    def _real(self) -> bool:
        return self.settings.simulate is None and self.settings.tier != "cpu"

    def look_again(self) -> None:
        """Forget the machine and its plans: the mask changed, or others let go of memory."""
        for name in ("machine", "plans", "fits_if_freed", "_unused"):
            self.__dict__.pop(name, None)

    @cached_property
    def fits_if_freed(self) -> bool:
        """Some plan would fit if nobody else held memory of the GPUs."""
        if self.plan.fits or not held(self.machine):
            return self.plan.fits
        return self.plans.fits_on(self.machine.idle())

    def _wait_for_memory(self, wanted: Wanted) -> None:
        """Plan with what is free once others have let go of it, waiting ``--gpu-wait`` at most.

        A game that has just ended still holds its VRAM for a moment.
        """

        def short() -> bool:
            unfit = wanted.plan and not self.plan.fits and self.fits_if_freed
            return unfit or would_help(wanted.needs, self.machine)

        deadline = time.monotonic() + self.settings.wait_seconds
        while held(self.machine) and short() and time.monotonic() < deadline:
            time.sleep(0.5)
            self.look_again()

    def _start_worker(self) -> WorkerRun:
        if self._worker is None:
            from .worker_run import WorkerRun

            self._worker = WorkerRun(self.machine.visible)
        return self._worker

    def worker_report(self) -> WorkerReport:
        """What the CUDA worker measured; waits for it."""
        worker = self._start_worker()
        if self._wanted.model:
            self._contexts  # noqa: B018
            self._imported  # noqa: B018
        return replace(worker.report(), unused=self._unused)

    @cached_property
    def _contexts(self) -> Contexts | None:
        """On their way to the load; None if it has to make its own."""
        try:
            if not self._wanted.ours or not self.plan.fits:
                return None
        except MultiGpuError:
            return None  # the checks of the plan say why
        places = self.plan.device_map.values()
        gpus = sorted({place for place in places if isinstance(place, int)})
        return Contexts(self._start_worker(), gpus)

    @cached_property
    def _imported(self) -> None:
        """Once: what loading needs takes seconds to import."""
        with _unwarned(), suppress(ImportError, MultiGpuError):  # the load tells
            import_ahead(self.plans.resolved, for_good=self._wanted.ours)

    @cached_property
    def _unused(self) -> frozenset[int]:
        """CUDA indices of the GPUs that the plan leaves empty; none if there is no plan.

        Nobody's own tests pay for a plan that none of them rests on.
        """
        if not self._wanted.plan:
            return frozenset()
        try:
            used = {device.device for device in self.plan.devices}
        except MultiGpuError:
            return frozenset()  # the checks of the plan say why
        every = range(len(self.machine.visible))
        return frozenset(gpu for gpu in every if f"cuda:{gpu}" not in used)

    def health(self) -> tuple[GpuHealth, ...]:
        """Health of every visible GPU, sampled until the worker had ended: so under load."""
        self.worker_report()
        return self._start_worker().health()

    def health_during(self, *steps: str) -> dict[int, GpuHealth]:
        """The same by CUDA index, of the seconds alone in which the worker took those steps."""
        found = [step for step in self.worker_report().steps if step.name in steps]
        ended = [step.started + step.seconds for step in found if step.seconds is not None]
        if not ended:
            return {}
        rows = self._start_worker().health_between(min(step.started for step in found), max(ended))
        return {self.machine.visible.index(row.index): row for row in rows}

    def load(self) -> LoadedModel:
        """The model of the chosen plan, loaded once; a failure is remembered, not retried.

        :raises MultiGpuError: it could not be loaded.
        """
        from .model.loading import load_model

        if self._model_error is not None:
            raise self._model_error
        if self._model is None:
            if self._worker is not None:
                self.worker_report()  # its contexts must be gone before we count bytes
                if self._contexts is not None:
                    self._contexts.wait()
            plan = self.plan
            self._imported  # noqa: B018
            try:
                self._model = load_model(
                    self.plans.resolved,
                    tier=plan.architecture.tier,
                    dtype=plan.architecture.dtype,
                    device_map=plan.device_map,
                    weights=plan.weights,
                    progress=self.on_progress,
                    plan=plan,
                    architecture=plan.architecture,
                )
            except MultiGpuError as error:
                self._model_error = error
                raise
        return self._model

    def release(self) -> None:
        """Free the model, whatever still refers to it."""
        if self._model is not None:
            from .model.loaded import release

            release(self._model)

    @cached_property
    def probe(self) -> Probe:
        """The probe of ``--gpu-probe``, else one synthesised for this model.

        :raises ProbeFileError: the file is damaged, refused or of no known format.
        """
        if self.settings.probe is not None:
            from .probes.formats import load_probe

            return load_probe(self.settings.probe)
        from .probes.synthetic import synthetic_probe

        architecture = self.plan.architecture
        return synthetic_probe(architecture.hidden_size, architecture.layers)

    def score_texts(self) -> TextScores:
        """The fixed text set scored by this run's probe on its model; kept for the report.

        :raises MultiGpuError: no model, no probe, or a score that could not be had.
        """
        from .textscores import text_scores

        loaded = self.load()
        self.scores = text_scores(
            loaded,
            self.probe,
            # What the plan has room for.
            room_tokens=self.settings.context * self.settings.batch,
            checkpoint=self.plans.resolved.checkpoint,
            gpus=[gpu.name for gpu in self.machine.visible_gpus],
            versions=self.versions,
        )
        return self.scores

    @cached_property
    def earlier_scores(self) -> tuple[TextScores, ...]:
        """Scores of the text set that earlier runs left in the folder of ``--gpu-report``.

        :raises UsageError: their file is damaged.
        """
        from .report.drift import DRIFT_FILE, read_drift

        folder = self.settings.report_dir
        return () if folder is None else read_drift(folder / DRIFT_FILE)

    def peak_meter(self) -> PeakMeter:
        """A peak meter over what the model may use; what it measures goes into the report."""
        from .model.memory import PeakMeter

        cpu = self.settings.tier == "cpu" or not self.machine.visible
        return PeakMeter(("cpu",) if cpu else self.gpus, self.peaks)

    @property
    def gpus(self) -> tuple[str, ...]:
        """``cuda:<index>`` of every visible GPU."""
        return tuple(f"cuda:{index}" for index in range(len(self.machine.visible)))

    def facts(self) -> dict[str, Any]:
        """What is known by now, for the report; asks nothing that was not asked before."""
        known = self.__dict__
        facts: dict[str, Any] = {"peaks": tuple(self.peaks), "tier": self.settings.named_tier}
        if "machine" in known:
            facts["machine"] = self.machine
        if "plans" in known and self.plans.made is not None:
            facts["plan"] = self.plans.made
            facts["tier"] = self.plans.made.architecture.tier
        if self.unsettled is not None:
            facts["unsettled"] = self.unsettled
        if self.scores is not None:
            facts["scores"] = self.scores
        if self._model is not None:
            facts["load"] = self._model.load
            facts["placement"] = self._model.placement
        return facts

    def close(self) -> None:
        """End what still runs or holds memory."""
        self.end_worker()
        self.release()


@contextmanager
def _unwarned() -> Iterator[None]:
    """Whatever filters a project has: libraries that are imported here may warn of something."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
