"""The pytest plugin: options, fixtures, and the rest only for runs that are about GPUs.

Importing it imports nothing heavy, and a run that has nothing to do with GPUs pays for no more
than the options: the hooks of :mod:`runtime` are registered when the first such test is met.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from . import fixtures, options
from .errors import UsageError

gpu_health = fixtures.gpu_health
gpu_inventory = fixtures.gpu_inventory
gpu_memory = fixtures.gpu_memory
gpu_model = fixtures.gpu_model
gpu_plan = fixtures.gpu_plan
gpu_probe = fixtures.gpu_probe
gpu_session = fixtures.gpu_session
gpu_settings = fixtures.gpu_settings
gpu_worker = fixtures.gpu_worker

MARKERS = (
    "quick: loads no model; `pytest -m quick` takes seconds.",
    "gpu(count=1, vram=None, total_vram=None, capability=None, nvlink=False): needs that many "
    "visible GPUs, each with `vram` free; `total_vram` free over all; a capability; NVLink.",
    'gpu_tier(tier): needs a plan of that tier ("4bit", "8bit", "16bit") or better that fits.',
    'gpu_peak_limit(size): fails the test if any GPU\'s peak during it is higher ("36GiB").',
    'gpu_leak_limit(size): fails the test if it leaves more than that behind on any GPU ("64MiB").',
    "check(needs): a shipped check; needs `plan`, `host`, `machine`, `gpu` or `model`.",
)
_NAMES = {"gpu", "gpu_tier", "gpu_peak_limit", "gpu_leak_limit", "check"}


def pytest_addoption(parser: pytest.Parser) -> None:
    options.add_options(parser)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> int | None:
    if not options.plan_wanted(config):
        return None
    from .planview import print_plan

    try:
        return print_plan(options.resolve(config), verbosity=config.option.verbose)
    except UsageError as error:
        raise pytest.UsageError(str(error)) from None


def pytest_configure(config: pytest.Config) -> None:
    for line in MARKERS:
        config.addinivalue_line("markers", line)
    try:
        settings = options.resolve(config)
    except UsageError as error:
        raise pytest.UsageError(str(error)) from None
    config.stash[fixtures.SETTINGS] = settings
    checks = str(Path(__file__).with_name("checks"))
    if settings.checks and checks not in config.args:
        config.args.append(checks)
    if hasattr(config, "workerinput"):
        from .parallel.worker import XdistWorker

        config.pluginmanager.register(XdistWorker(config), "multigpu-worker")
    # Under xdist the controller collects nothing, but it prints.
    if settings.asked or config.getoption("dist", "no") != "no":
        _register_runtime(config)


def pytest_sessionstart(session: pytest.Session) -> None:
    config = session.config
    alone = not hasattr(config, "workerinput") and config.getoption("dist", "no") == "no"
    checks = str(Path(__file__).with_name("checks"))
    asked = any("pytest_multigpu.checks" in arg or arg.startswith(checks) for arg in config.args)
    if asked and alone and not config.option.collectonly:
        _register_runtime(config)
        try:
            fixtures.session_of(config).run_ahead()
        except UsageError as error:
            raise pytest.UsageError(str(error)) from None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    concerned = [item for item in items if _about_gpus(item)]
    if not concerned:
        return
    from .ordering import order

    _register_runtime(config)
    order(items, concerned)


def _about_gpus(item: pytest.Item) -> bool:
    return not _NAMES.isdisjoint(mark.name for mark in item.iter_markers()) or any(
        name.startswith("gpu_") and name in globals() for name in getattr(item, "fixturenames", ())
    )


def _register_runtime(config: pytest.Config) -> None:
    if config.pluginmanager.has_plugin("multigpu-runtime"):
        return
    from . import runtime, timeouts
    from .runlog import RunLog

    try:
        log = RunLog(config)
    except UsageError as error:
        raise pytest.UsageError(str(error)) from None
    config.pluginmanager.register(runtime, "multigpu-runtime")
    config.pluginmanager.register(timeouts.Watchdog(log.give_up), "multigpu-watchdog")
    if log.controller is not None:
        config.pluginmanager.register(log.controller, "multigpu-controller")
    config.pluginmanager.register(log, "multigpu-runlog")
