"""The pytest plugin: options, fixtures, and the rest only for runs that are about GPUs.

Importing it imports nothing heavy, and a run that has nothing to do with GPUs pays for no more
than the options: the hooks of :mod:`runtime` are registered when the first such test is met.
"""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest

from . import fixtures, options
from .concern import about_gpus
from .parallel import distributes
from .usage import WORKER, usage_errors

gpu_health = fixtures.gpu_health
gpu_inventory = fixtures.gpu_inventory
gpu_memory = fixtures.gpu_memory
gpu_model = fixtures.gpu_model
gpu_plan = fixtures.gpu_plan
gpu_probe = fixtures.gpu_probe
gpu_session = fixtures.gpu_session
gpu_settings = fixtures.gpu_settings
gpu_worker = fixtures.gpu_worker

CHECKS = str(Path(__file__).with_name("checks"))
RUNTIME = "multigpu-runtime"
MARKERS = (
    "quick: loads no model; `pytest -m quick` takes seconds.",
    "gpu(count=1, vram=None, total_vram=None, capability=None, nvlink=False): needs that many "
    "visible GPUs, each with `vram` free; `total_vram` free over all; a capability; NVLink.",
    'gpu_tier(tier): needs a plan of that tier ("4bit", "8bit", "16bit") or better that fits.',
    'gpu_peak_limit(size): fails the test if any GPU\'s peak during it is higher ("36GiB").',
    'gpu_leak_limit(size): fails the test if it leaves more than that behind on any GPU ("64MiB").',
    "check(needs): a shipped check; needs `plan`, `host`, `machine`, `gpu` or `model`.",
)

_INFORMS = ("help", "version", "markers", "showfixtures", "show_fixtures_per_test")
"""pytest's options that run no test."""


def pytest_addoption(parser: pytest.Parser) -> None:
    options.add_options(parser)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> int | None:
    with usage_errors(config):
        if options.plan_wanted(config) and not _only_informs(config):
            from .planview import print_plan

            return print_plan(options.resolve(config), verbosity=config.option.verbose)
    return None


def pytest_configure(config: pytest.Config) -> None:
    for line in MARKERS:
        config.addinivalue_line("markers", line)
    if _only_informs(config):
        return
    if hasattr(config, "workerinput"):
        from .parallel.worker import XdistWorker

        config.pluginmanager.register(XdistWorker(config), WORKER)
    with usage_errors(config):
        if options.checks_wanted(config) and CHECKS not in config.args:
            config.args.append(CHECKS)
        # Under xdist the controller collects nothing, but it prints.
        if options.asked(config) or distributes(config):
            _register_runtime(config)


def pytest_sessionstart(session: pytest.Session) -> None:
    config = session.config
    alone = not hasattr(config, "workerinput") and not distributes(config)
    asked = any("pytest_multigpu.checks" in arg or arg.startswith(CHECKS) for arg in config.args)
    if asked and alone and not config.option.collectonly and not _only_informs(config):
        with usage_errors(config):
            _register_runtime(config)
            fixtures.session_of(config).run_ahead()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> Generator[None, None, None]:
    """When all others have added their marks and taken tests out; before them too where
    ``--stepwise`` goes by the order."""
    if _only_informs(config):
        return (yield)
    if config.getoption("stepwise", False) and _concerned(config, items):
        from .ordering import in_order

        with usage_errors(config):
            items[:] = in_order(items)
    yield
    if _concerned(config, items):
        from .ordering import order

        with usage_errors(config):
            _register_runtime(config)
            order(items)


def _concerned(config: pytest.Config, items: list[pytest.Item]) -> bool:
    return config.pluginmanager.has_plugin(RUNTIME) or any(map(about_gpus, items))


def _only_informs(config: pytest.Config) -> bool:
    return any(getattr(config.option, name, False) for name in _INFORMS)


def _register_runtime(config: pytest.Config) -> None:
    """:raises UsageError: an option, or a file that one names, cannot be."""
    if config.pluginmanager.has_plugin(RUNTIME):
        return
    from . import runtime, timeouts
    from .runlog import RunLog

    log = RunLog(config)
    config.pluginmanager.register(runtime, RUNTIME)
    config.pluginmanager.register(timeouts.Watchdog(log.give_up), fixtures.WATCHDOG)
    if log.controller is not None:
        config.pluginmanager.register(log.controller, "multigpu-controller")
    config.pluginmanager.register(log, "multigpu-runlog")
