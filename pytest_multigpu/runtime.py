"""The hooks around each test, registered only in runs that are about GPUs. Short delegations."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

from .fixtures import session_of
from .freeing import clear_failure, give_back, ran_out_of_memory
from .limits import measured
from .markers import check_needs
from .outcomes import NEXT, annotate, open_gate, run_check
from .timeouts import limit_check


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(
    item: pytest.Item, nextitem: pytest.Item | None
) -> Generator[None, object, object]:
    item.stash[NEXT] = None if nextitem is None else nextitem.nodeid
    limit_check(item, session_of(item.config))  # before pytest-timeout reads the marks
    return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    open_gate(item, session_of(item.config))


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> object | None:
    if check_needs(pyfuncitem) is None:
        return None
    run_check(pyfuncitem, strict=session_of(pyfuncitem.config).settings.strict)
    return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    with measured(item, session_of(item.config)):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    annotate(item, report, None if call.excinfo is None else call.excinfo.value)
    if call.excinfo is not None and not item.config.getoption("usepdb", False):
        # The text is made; a failed test's frames would keep its tensors on the GPUs.
        clear_failure(call.excinfo.value)
        if ran_out_of_memory(call.excinfo.value):
            give_back()
    return report
