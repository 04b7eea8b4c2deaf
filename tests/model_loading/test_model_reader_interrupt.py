"""An interrupt may leave the reader's lock taken; ending the load must not wait for it."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from pytest_multigpu.model.reader import ReadAhead


@pytest.mark.timeout(20)
def test_close_lets_go_of_a_lock_that_an_interrupt_left_taken() -> None:
    reader: Any = ReadAhead([])
    entered = threading.Event()

    def waiting_worker() -> None:
        entered.set()
        with reader._lock:
            pass

    reader._lock.acquire()  # what a KeyboardInterrupt leaves behind
    reader._lock.acquire()
    worker = threading.Thread(target=waiting_worker, daemon=True)
    reader._workers.append(worker)
    worker.start()
    assert entered.wait(5)
    reader.close()
    assert not worker.is_alive()
