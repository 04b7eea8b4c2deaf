"""The fixtures: short delegations to the session, which finds each thing once.

Session fixtures are immutable records, except the loaded model, which is freed at the end.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .model.loaded import LoadedModel
    from .model.memory import PeakMeter
    from .options import Settings
    from .probes.probe import Probe
    from .records.health import GpuHealth
    from .records.machine import Machine
    from .records.plan import Plan
    from .records.worker import WorkerReport
    from .session import GpuSession

WATCHDOG = "multigpu-watchdog"
"""Name of the plugin that watches over what may hang."""
_SESSION = pytest.StashKey["GpuSession"]()


def session_of(config: pytest.Config) -> GpuSession:
    """The one session of this process, made when it is first asked for.

    :raises UsageError: an option or ini value that cannot be.
    """
    if _SESSION not in config.stash:
        from .options import resolve
        from .session import GpuSession

        config.stash[_SESSION] = GpuSession(resolve(config), os.environ)
    return config.stash[_SESSION]


@pytest.fixture(scope="session")
def gpu_session(request: pytest.FixtureRequest) -> GpuSession:
    """Everything this run knows; the other fixtures are views of it."""
    return session_of(request.config)


@pytest.fixture(scope="session")
def gpu_settings(gpu_session: GpuSession) -> Settings:
    """What was asked for: options, ini values and the game's JSON, resolved."""
    return gpu_session.settings


@pytest.fixture(scope="session")
def gpu_inventory(gpu_session: GpuSession) -> Machine:
    """The machine: every GPU that NVML shows and which of them CUDA sees, in CUDA order."""
    return gpu_session.machine


@pytest.fixture(scope="session")
def gpu_worker(gpu_session: GpuSession) -> WorkerReport:
    """What the CUDA worker, a short-lived subprocess, measured on every visible GPU."""
    return gpu_session.worker_report()


@pytest.fixture(scope="session")
def gpu_health(gpu_session: GpuSession) -> tuple[GpuHealth, ...]:
    """Health of every visible GPU by NVML, sampled while the CUDA worker loads them."""
    return gpu_session.health()


@pytest.fixture(scope="session")
def gpu_plan(gpu_session: GpuSession) -> Plan:
    """Where everything goes and what it takes, per device, in bytes."""
    return gpu_session.plan


@pytest.fixture(scope="session")
def gpu_model(gpu_session: GpuSession, request: pytest.FixtureRequest) -> Iterator[LoadedModel]:
    """The loaded model with its observed placement, load seconds and peaks.

    One load a session. Skips where no tier fits (fails where a tier was named or under strict),
    with what was needed and found. Freed at the end, also after failures.
    """
    from .gating import model_gate, obey

    # For a test that asks for it by name at run time; others were asked before their setup.
    obey(model_gate(gpu_session))
    watchdog = request.config.pluginmanager.get_plugin(WATCHDOG)
    try:
        with nullcontext() if watchdog is None else watchdog.loading(gpu_session):
            loaded = gpu_session.load()
        yield loaded
    finally:
        gpu_session.release()


@pytest.fixture(scope="session")
def gpu_probe(gpu_session: GpuSession) -> Probe:
    """The probe of ``--gpu-probe``, else one synthesised for the model of this run."""
    return gpu_session.probe


@pytest.fixture
def gpu_memory(gpu_session: GpuSession) -> PeakMeter:
    """The peak meter of every visible GPU, for one test."""
    return gpu_session.peak_meter()
