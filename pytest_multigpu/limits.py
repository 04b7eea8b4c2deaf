"""``gpu_peak_limit`` and ``gpu_leak_limit``: measured around a test, failing it if exceeded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from .markers import size_limit
from .session import GpuSession


@contextmanager
def measured(item: pytest.Item, session: GpuSession) -> Iterator[None]:
    """Measure what the test's marks limit; a test without them pays nothing.

    What the test itself raised goes on as it is: it is the better reason.
    """
    peak_limit = size_limit(item, "gpu_peak_limit")
    leak_limit = size_limit(item, "gpu_leak_limit")
    if peak_limit is None and leak_limit is None:
        yield
        return
    from .judging.memory import leak_limit_failures, peak_limit_failures
    from .model.growth import GrowthMeter
    from .model.memory import LeakMeter
    from .model.witness import Witness

    witness = Witness(session.gpus)
    leaks = None if leak_limit is None else LeakMeter(witness)
    meter = GrowthMeter(witness)
    with meter.measure():
        yield
    lines = [] if peak_limit is None else peak_limit_failures(meter.growths, peak_limit)
    if leaks is not None and leak_limit is not None:
        lines += leak_limit_failures(leaks.leftover(), leak_limit)
    if lines:
        pytest.fail("\n".join(lines), pytrace=False)
