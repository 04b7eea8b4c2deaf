"""``gpu_peak_limit`` and ``gpu_leak_limit``: measured around a test, failing it if exceeded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from .markers import size_limit
from .session import GpuSession


@contextmanager
def measured(item: pytest.Item, session: GpuSession) -> Iterator[None]:
    """Measure what the test's marks limit; a test without them pays nothing."""
    peak_limit = size_limit(item, "gpu_peak_limit")
    leak_limit = size_limit(item, "gpu_leak_limit")
    if peak_limit is None and leak_limit is None:
        yield
        return
    raise NotImplementedError
