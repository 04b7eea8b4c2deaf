"""Time limits of the shipped checks, given to pytest-timeout, and a second one for hard hangs.

Whoever configures pytest-timeout (``--timeout``, PYTEST_TIMEOUT, its ini value, its marker) gets
just that. A call that hangs inside the driver never comes back to Python, so pytest-timeout's
signal has nothing to interrupt: a watchdog then writes the report and ends the process. It needs
no pytest-timeout.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from .fixtures import session_of
from .markers import check_needs
from .session import GpuSession

QUICK_SECONDS = 120.0
"""Above the CUDA worker's own limit, which knows better where it hung. ``--gpu-wait`` is added."""
MODEL_SECONDS = 300.0
"""For a check of a loaded model; the first of them also loads it."""
CHECKPOINT_BYTES_PER_S = 50e6
"""A slow network volume."""
SYNTHETIC_BYTES_PER_S = 500e6
"""Half of what the slowest way measured: int8 through the stock loader, on one GPU."""
UNKNOWN_BYTES = 150 * 10**9
"""To load, where the plan was not asked for yet: a 70B in 16 bit."""
GRACE_SECONDS = 20.0
"""Between pytest-timeout's limit and the watchdog's."""


def limit_check(item: pytest.Item, session: GpuSession) -> None:
    """Give a shipped check its limit, unless the user has one of his own."""
    needs = check_needs(item)
    if needs is not None and _loaded(item.config) and not _set_by_user(item):
        item.add_marker(pytest.mark.timeout(seconds_for(needs, session)))


def seconds_for(needs: str, session: GpuSession) -> float:
    """The limit of a check that needs this."""
    if needs != "model":
        return QUICK_SECONDS + session.settings.wait_seconds
    return MODEL_SECONDS + load_seconds(session)


def load_seconds(session: GpuSession) -> float:
    """How long loading may still take; 0 once it is done."""
    facts = session.facts()
    plan = facts.get("plan")
    if "load" in facts or session.settings.tier == "cpu":
        return 0.0
    if plan is None:
        return UNKNOWN_BYTES / CHECKPOINT_BYTES_PER_S
    rate = CHECKPOINT_BYTES_PER_S if plan.weights == "checkpoint" else SYNTHETIC_BYTES_PER_S
    return float(plan.architecture.parameters * 2 / rate)


def _loaded(config: pytest.Config) -> bool:
    return bool(config.pluginmanager.hasplugin("timeout"))


def _set_by_user(item: pytest.Item) -> bool:
    """pytest-timeout is there and was told what to do: its limit, or that there is none."""
    config = item.config
    if not _loaded(config):
        return False
    return (
        item.get_closest_marker("timeout") is not None
        or config.getoption("timeout", None) is not None
        or bool(os.environ.get("PYTEST_TIMEOUT") or config.getini("timeout"))
    )


class Watchdog:
    """Ends a run that nothing else could interrupt, once its report is written.

    A plugin object: it joins in whenever pytest-timeout sets a timer, whoever set the limit. Where
    pytest-timeout is not loaded it watches the shipped checks by itself; and the load of a model
    wherever nobody set a limit.
    """

    def __init__(self, give_up: Callable[[str, str], None]) -> None:
        """:param give_up: called with node id and reason; writes and prints, then it ends."""
        self._give_up = give_up
        self._timer: threading.Timer | None = None
        self._item: pytest.Item | None = None

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        self._item = item
        needs = check_needs(item)
        try:
            if needs is None or _loaded(item.config):
                return (yield)
            with self._within(seconds_for(needs, session_of(item.config)), "hung"):
                return (yield)
        finally:
            self._item = None

    @contextmanager
    def loading(self, session: GpuSession) -> Iterator[None]:
        """Around the load of a model, for whichever test it is loaded first."""
        if self._item is None or _set_by_user(self._item):
            yield
            return
        with self._within(MODEL_SECONDS + load_seconds(session), "loading hung"):
            yield

    @contextmanager
    def _within(self, seconds: float, what: str) -> Iterator[None]:
        timer = self._start(seconds, what)
        try:
            yield
        finally:
            timer.cancel()

    @pytest.hookimpl(optionalhook=True, tryfirst=True)
    def pytest_timeout_set_timer(self, item: pytest.Item, settings: Any) -> None:
        self.pytest_timeout_cancel_timer()
        self._item = item
        self._timer = self._start(settings.timeout, "hung")

    @pytest.hookimpl(optionalhook=True, tryfirst=True)
    def pytest_timeout_cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _start(self, seconds: float, what: str) -> threading.Timer:
        nodeid = "" if self._item is None else self._item.nodeid
        reason = f"{what}: not ended {seconds:g} s after its start, nor interrupted"
        timer = threading.Timer(seconds + GRACE_SECONDS, self._fire, (nodeid, reason))
        timer.daemon = True
        timer.start()
        return timer

    def _fire(self, nodeid: str, reason: str) -> None:
        from pytest_timeout import is_debugging

        if not is_debugging():
            self._give_up(nodeid, reason)
