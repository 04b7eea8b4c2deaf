"""What a load needs is made ready while the CUDA worker measures, and never before it may be."""

from __future__ import annotations

import functools
import gc
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest
from fake_libcuda import FakeLibcuda
from fake_worker import Handle

from pytest_multigpu.errors import LoadError
from pytest_multigpu.importing import uncollected
from pytest_multigpu.machine.cuda import early
from pytest_multigpu.machine.cuda.early import EarlyContexts
from pytest_multigpu.machine.fake import FakeNvml
from pytest_multigpu.model import loading
from pytest_multigpu.model.config import ResolvedModel
from pytest_multigpu.options import Settings
from pytest_multigpu.records.worker import WorkerReport
from pytest_multigpu.requirements import Wanted
from pytest_multigpu.session import GpuSession
from pytest_multigpu.units import GIB

SETTINGS = Settings(tier="4bit", placement="balanced")
CHECKS = Wanted(worker=True, model=True, plan=True, ours=True)


@pytest.fixture
def imported(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the models that were imported for."""
    asked: list[str] = []
    monkeypatch.setattr(loading, "import_all", lambda resolved: asked.append(resolved.name))
    return asked


@pytest.fixture
def woken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the driver was asked for; its GPU i is device 10 + i."""
    asked: list[str] = []
    monkeypatch.setattr(early, "EarlyContexts", early_contexts(FakeLibcuda(asked)))
    return asked


def early_contexts(library: FakeLibcuda) -> Callable[..., EarlyContexts]:
    return functools.partial(EarlyContexts, lambda: library)


@pytest.mark.usefixtures("fake", "handles", "woken")
@pytest.mark.parametrize("broken", [None, ImportError("no accelerate"), LoadError("no bnb")])
def test_what_loading_needs_is_imported_while_the_worker_measures(
    monkeypatch: pytest.MonkeyPatch, broken: Exception | None
) -> None:
    asked: list[str] = []

    def imported(resolved: ResolvedModel) -> None:
        asked.append(resolved.name)
        if broken is not None:
            raise broken

    monkeypatch.setattr(loading, "import_all", imported)
    expected: tuple[tuple[Wanted, list[str]], ...] = (
        (Wanted(worker=True), []),
        (Wanted(worker=True, model=True), ["llama-3.3-70b"]),
    )
    for wanted, names in expected:
        session = GpuSession(SETTINGS, os.environ)
        session.start(wanted)
        # An import that fails is the load's to tell.
        assert session.worker_report().failure is None
        assert session.worker_report().failure is None  # and it is asked for once
        assert asked == names


@pytest.mark.usefixtures("fake", "imported")
def test_contexts_are_made_when_the_worker_has_ended(
    monkeypatch: pytest.MonkeyPatch, handles: list[Handle], woken: list[str]
) -> None:
    ended = threading.Event()
    monkeypatch.setattr(Handle, "result", lambda _self: ended.wait(10) and WorkerReport())
    session = GpuSession(SETTINGS, os.environ)
    session.start(CHECKS)
    contexts = session._contexts
    assert contexts is not None
    assert len(handles) == 1
    assert not woken
    ended.set()
    session.worker_report()
    contexts.wait()
    assert woken[0] == "init"
    assert sorted(woken[1:]) == ["context 10", "context 11"]


@pytest.mark.usefixtures("handles", "imported")
def test_a_load_waits_for_contexts_that_are_on_their_way(
    fake: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.gpus[1].total = 2 * GIB  # the plan leaves it empty
    order: list[str] = []
    library = FakeLibcuda(order)
    library.go.clear()
    monkeypatch.setattr(early, "EarlyContexts", early_contexts(library))

    def load(*_args: Any, **_options: Any) -> None:
        order.append("load")

    monkeypatch.setattr(loading, "load_model", load)
    session = GpuSession(SETTINGS, os.environ)
    session.start(CHECKS)
    session.worker_report()
    threading.Timer(0.2, library.go.set).start()
    session.load()
    # The context that cannot be made, FakeLibcuda's never can, is for the load to tell.
    assert order == ["init", "context 10", "load"]


@pytest.mark.usefixtures("imported")
@pytest.mark.parametrize("why", ["own tests", "no model", "does not fit", "worker failed"])
def test_contexts_are_made_for_nobody_else(
    fake: FakeNvml, handles: list[Handle], woken: list[str], why: str
) -> None:
    wanted = CHECKS
    if why == "own tests":  # that may fork, or measure what they leave behind
        wanted = Wanted(worker=True, model=True, plan=True)
    elif why == "no model":
        wanted = Wanted(worker=True, plan=True, ours=True)
    elif why == "does not fit":
        for gpu in fake.gpus:
            gpu.total = 2 * GIB
    session = GpuSession(SETTINGS, os.environ)
    session.start(wanted)
    if why == "worker failed":
        handles[0].failure = "the CUDA worker hung"
    session.worker_report()
    if why == "worker failed":
        assert session._contexts is not None
        session._contexts.wait()
    assert not woken


@pytest.mark.usefixtures("fake", "handles", "imported", "woken")
@pytest.mark.parametrize("ours", [True, False])
def test_what_is_imported_is_kept_for_good_where_nobody_elses_tests_run(
    monkeypatch: pytest.MonkeyPatch, ours: bool
) -> None:
    frozen: list[bool] = []
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(True))
    session = GpuSession(SETTINGS, os.environ)
    session.start(Wanted(worker=True, model=True, plan=True, ours=ours))
    session.worker_report()
    session.worker_report()
    assert frozen == [True] * ours


@pytest.mark.parametrize("collecting", [True, False])
def test_the_garbage_collector_rests_and_is_as_before(collecting: bool) -> None:
    assert gc.isenabled()
    try:
        if not collecting:
            gc.disable()
        with uncollected():
            assert not gc.isenabled()
        assert gc.isenabled() is collecting
    finally:
        gc.enable()
