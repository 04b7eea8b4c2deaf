"""``-p stop_at``: the run stops for ever at ``STOP_AT`` (load, generation, or the first-write,
start-write, between or end-write of a report) and makes the file ``STOPPED``: there a test can kill
it."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

_AT = os.environ["STOP_AT"]


def stop() -> None:
    Path("STOPPED").touch()
    time.sleep(600)


@pytest.fixture(scope="session", autouse=True)
def _stop_in_the_model(request: pytest.FixtureRequest) -> None:
    if _AT == "load":
        from pytest_multigpu.model import loading

        load = loading.load_model

        def halted(*args: Any, progress: Any, **values: Any) -> Any:
            return load(*args, progress=lambda moment: stop(), **values)

        loading.load_model = halted  # type: ignore[assignment]
    if _AT == "generation":
        from pytest_multigpu.model import generation

        first = generation.first_generation
        calls: list[int] = []

        def third(*unused: Any) -> None:
            calls.append(1)
            if len(calls) == 3:
                stop()

        def watched(loaded: Any, **values: Any) -> Any:
            loaded.model.register_forward_hook(third)
            return first(loaded, **values)

        generation.first_generation = watched  # type: ignore[assignment]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_logstart(nodeid: str) -> None:
    second = nodeid.endswith("test_second")
    if _AT == "start-write" and second:
        _halt_the_next_write()
    if _AT == "between" and second:
        stop()


@pytest.hookimpl(trylast=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if _AT == "start-write" and item.name == "test_second":
        stop()  # whatever was written at its start is written


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    ended = {"first-write": "test_first", "end-write": "test_second"}.get(_AT, "nothing")
    if report.when == "teardown" and report.nodeid.endswith(ended):
        _halt_the_next_write()


def _halt_the_next_write() -> None:
    """In the middle: the new file is there and not yet in the place of the old one."""
    os.fsync = lambda handle: stop()  # type: ignore[assignment]
