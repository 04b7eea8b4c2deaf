"""An xdist worker's side: its own GPUs, taken before CUDA starts, and its facts for the controller.

The rule: a worker owns one GPU of the caller's mask, for as long as it lives; tests that need more
than one, or the machine as a whole, are one group, and the worker that runs it owns them all.
GPUs are owned by file locks (:mod:`machine.gpu_locks`), taken just before the first test that needs
one, outside pytest-timeout's clock; whoever finds none free waits.
"""

from __future__ import annotations

import ctypes
import os
import socket
import time
from collections.abc import Generator
from typing import Any

import pytest

from ..concern import about_gpus
from ..errors import MachineError
from ..fixtures import session_of
from ..machine.gpu_locks import GpuLocks
from ..markers import wanted
from ..session import GpuSession
from ..waiting import held
from .grouping import Share, share
from .wire import FACTS, HOST, REFUSED, TOGETHER, name_group, pack

LOCK_SECONDS = 4 * 3600.0
"""Others may be busy with a whole run first."""
_NOT_INITIALISED = 3
_CUDA = "CUDA_VISIBLE_DEVICES"


class XdistWorker:
    """A plugin object, registered in every xdist worker."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.name: str = config.workerinput["workerid"]  # type: ignore[attr-defined]
        self._folder: str | None = config.workerinput.get(TOGETHER)  # type: ignore[attr-defined]
        self._locks: GpuLocks | None = None
        self._owns_all = False
        self._sent = ""
        self._refused: str | None = None
        # torch.cuda.is_available() must not start the driver at collection: it reads the mask
        # once. With this torch asks NVML.
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

    @property
    def session(self) -> GpuSession:
        return session_of(self.config)

    def refuse(self, text: str) -> None:
        """A usage error: run nothing, and tell the controller, which ends the run with it.

        Raised here, it would be a crash to xdist.
        """
        self._refused = self._refused or text

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Before xdist tells the controller that this worker has collected."""
        if self._refused is not None:
            session.items.clear()
            return
        whole = [item.nodeid for item in session.items if share(item) == "all"]
        name_group(self._folder, self.name, whole)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        need = share(item)
        if need != "none":
            try:
                self._own(need, item)
            except MachineError as error:
                item.stash[UNOWNED] = str(error)
        return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, object, object]:
        """Around the gate, which would skip for what this worker does not own."""
        if UNOWNED in item.stash:
            pytest.fail(item.stash[UNOWNED], pytrace=False)
        return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        notes: dict[str, Any] | None = getattr(report, "gpu", None)
        if notes is not None and report.when == "teardown":
            facts = pack(self.session.facts())
            if facts != self._sent:
                notes[FACTS] = self._sent = facts
        return report

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self) -> Generator[None, object, object]:
        output: dict[str, Any] = self.config.workeroutput  # type: ignore[attr-defined]
        output[REFUSED] = self._refused
        if self._refused is None:
            output[FACTS] = pack(self.session.facts())
            output[HOST] = socket.gethostname()
        try:
            return (yield)
        finally:
            if self._locks is not None:
                self._locks.release()

    def _own(self, need: Share, item: pytest.Item) -> None:
        """Take the GPUs of this worker, once.

        :raises MachineError: none came free, or this worker can no longer be put onto its own.
        """
        session = self.session
        if not session.settings.takes_gpus:
            return
        if self._locks is not None:
            if need == "all" and not self._owns_all:
                raise MachineError(
                    f"this test needs all GPUs, but worker {self.name} owns "
                    f"{os.environ.get(_CUDA)} since an earlier test; run it without xdist"
                )
            return
        visible = session.machine.visible_gpus
        if session.machine.problem is not None or not visible:
            return  # the gate says so
        uuids = [gpu.uuid or f"index-{gpu.index}" for gpu in visible]
        alone = need == "one" and len(visible) > 1
        if alone and driver_started():
            raise MachineError(
                f"CUDA was started in worker {self.name} before its GPU was chosen: start it in "
                "fixtures or tests, not when a module is imported or collected"
            )
        locks = GpuLocks()
        waits: list[str] = []
        held = locks.acquire(uuids, 1 if alone else len(uuids), LOCK_SECONDS, on_wait=waits.append)
        self._locks, self._owns_all = locks, not alone
        if alone:
            os.environ[_CUDA] = held[0]
        session.look_again()
        if waits:
            self._settle(session)
        self._start(session, item)

    def _settle(self, session: GpuSession) -> None:
        """The process that held a GPU until now needs a moment to be gone from it."""
        deadline = time.monotonic() + session.settings.wait_seconds
        while held(session.machine) and time.monotonic() < deadline:
            time.sleep(0.25)
            session.look_again()

    def _start(self, session: GpuSession, item: pytest.Item) -> None:
        """What a run without xdist does before its first test."""
        if self._owns_all:
            items = item.session.items
            session.start(wanted([one for one in items if about_gpus(one)]))


UNOWNED = pytest.StashKey[str]()


def driver_started() -> bool:
    """Has the CUDA driver read this process's environment already? Asks without starting it."""
    try:
        driver = ctypes.CDLL("libcuda.so.1", mode=os.RTLD_NOLOAD)
    except OSError:
        return False
    number = ctypes.c_int()
    return bool(driver.cuDeviceGetCount(ctypes.byref(number)) != _NOT_INITIALISED)
