"""Time limits of the shipped checks, given to pytest-timeout, and a second one for hard hangs.

Whoever configures pytest-timeout (``--timeout``, PYTEST_TIMEOUT, its ini value, its marker) gets
just that. A call that hangs inside the driver never comes back to Python, so pytest-timeout's
signal has nothing to interrupt: a watchdog then writes the report and ends the process.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import pytest

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
    if needs is None or item.get_closest_marker("timeout") is not None or _configured(item.config):
        return
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


def _configured(config: pytest.Config) -> bool:
    """pytest-timeout has a limit for every test, or is not loaded."""
    if not config.pluginmanager.hasplugin("timeout"):
        return True
    given = config.getoption("timeout", None)
    return given is not None or bool(os.environ.get("PYTEST_TIMEOUT") or config.getini("timeout"))


class Watchdog:
    """Ends a run that pytest-timeout could not interrupt, once its report is written.

    A plugin object: it joins in whenever pytest-timeout sets a timer, whoever set the limit.
    """

    def __init__(self, give_up: Callable[[str, str], None]) -> None:
        """:param give_up: called with node id and reason; writes and prints, then it ends."""
        self._give_up = give_up
        self._timer: threading.Timer | None = None

    @pytest.hookimpl(optionalhook=True, tryfirst=True)
    def pytest_timeout_set_timer(self, item: pytest.Item, settings: Any) -> None:
        self.pytest_timeout_cancel_timer()
        seconds = settings.timeout + GRACE_SECONDS
        self._timer = threading.Timer(seconds, self._fire, (item.nodeid, settings.timeout))
        self._timer.daemon = True
        self._timer.start()

    @pytest.hookimpl(optionalhook=True, tryfirst=True)
    def pytest_timeout_cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _fire(self, nodeid: str, seconds: float) -> None:
        from pytest_timeout import is_debugging

        if not is_debugging():
            self._give_up(nodeid, f"hung: not ended {seconds:g} s after its start, nor interrupted")
