"""The pytest plugin: hooks, each a short delegation. Importing it imports nothing heavy."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from . import fixtures, markers, options
from .errors import UsageError
from .limits import measured
from .outcomes import annotate, open_gate, run_check
from .runlog import RunLog
from .session import GpuSession

gpu_health = fixtures.gpu_health
gpu_inventory = fixtures.gpu_inventory
gpu_memory = fixtures.gpu_memory
gpu_model = fixtures.gpu_model
gpu_plan = fixtures.gpu_plan
gpu_probe = fixtures.gpu_probe
gpu_session = fixtures.gpu_session
gpu_settings = fixtures.gpu_settings
gpu_worker = fixtures.gpu_worker

# In this order: a sick machine shows before a minute of loading is spent on it.
CHECK_ORDER = (
    "test_machine",
    "test_interconnect",
    "test_plan",
    "test_distribution",
    "test_generation",
    "test_probe_scoring",
    "test_peak_memory",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    options.add_options(parser)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> int | None:
    try:
        if not options.plan_wanted(config):
            return None
        from .planview import print_plan

        return print_plan(options.resolve(config))
    except UsageError as error:
        raise pytest.UsageError(str(error)) from None


def pytest_configure(config: pytest.Config) -> None:
    markers.register(config)
    try:
        settings = options.resolve(config)
    except UsageError as error:
        raise pytest.UsageError(str(error)) from None
    session = GpuSession(settings, os.environ)
    config.stash[fixtures.SESSION] = session
    # The log hears of tests through its own hooks; under xdist only the controller's prints.
    config.pluginmanager.register(RunLog(config, session), "multigpu-runlog")
    checks = str(Path(__file__).with_name("checks"))
    if settings.checks and checks not in config.args:
        config.args.append(checks)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        markers.validate(item)
    items.sort(key=_order)


def _order(item: pytest.Item) -> tuple[int, int]:
    """Quick checks, then what loads nothing, then what uses the model, which is freed after it."""
    name = item.path.stem
    place = CHECK_ORDER.index(name) if name in CHECK_ORDER else len(CHECK_ORDER)
    if markers.check_needs(item) is None:
        return (2 if "gpu_model" in getattr(item, "fixturenames", ()) else 1, 0)
    return (0 if item.get_closest_marker("quick") else 2, place)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    open_gate(item, item.config.stash[fixtures.SESSION])


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> object | None:
    if markers.check_needs(pyfuncitem) is None:
        return None
    run_check(pyfuncitem, strict=pyfuncitem.config.stash[fixtures.SESSION].settings.strict)
    return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    with measured(item, item.config.stash[fixtures.SESSION]):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    annotate(item, report)
    return report
