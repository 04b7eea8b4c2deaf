"""Contexts made early: in the right order, and never a failure of their own."""

from __future__ import annotations

import threading
from typing import Any

from fake_libcuda import FakeLibcuda

from pytest_multigpu.machine.cuda.early import EarlyContexts


def test_the_driver_is_started_before_it_makes_any_context() -> None:
    asked: list[str] = []
    library = FakeLibcuda(asked)
    early = EarlyContexts(lambda: library).start()
    early.wait_for_driver()
    for gpu in range(3):  # one more than the driver has
        early.wait_for(gpu)
    assert asked[0] == "init"
    assert sorted(asked[1:]) == ["context 10", "context 11"]


def test_only_the_gpus_that_are_asked_for_get_one() -> None:
    asked: list[str] = []
    early = EarlyContexts(lambda: FakeLibcuda(asked, count=4), gpus=[1, 3, 7]).start()
    early.wait_for_driver()
    for gpu in (1, 3, 7):
        early.wait_for(gpu)
    assert sorted(asked) == ["context 11", "context 13", "init"]


def test_waiting_for_a_gpu_waits_for_its_context() -> None:
    asked: list[str] = []
    library = FakeLibcuda(asked, count=1)
    library.go.clear()
    early = EarlyContexts(lambda: library).start()
    early.wait_for_driver()
    waiting = threading.Thread(target=early.wait_for, args=(0,), daemon=True)
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    library.go.set()
    waiting.join(5)
    assert asked == ["init", "context 10"]


def test_no_driver_and_a_driver_that_does_not_start_are_left_to_torch() -> None:
    def missing() -> Any:
        raise OSError("libcuda.so.1: cannot open shared object file")

    early = EarlyContexts(missing).start()
    early.wait_for_driver()
    early.wait_for(0)
    asked: list[str] = []
    early = EarlyContexts(lambda: FakeLibcuda(asked, init=803)).start()
    early.wait_for_driver()
    early.wait_for(0)
    assert asked == ["init"]


def test_one_that_was_never_started_waits_for_nothing() -> None:
    early = EarlyContexts()
    early.wait_for_driver()
    early.wait_for(0)
