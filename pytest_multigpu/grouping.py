"""Which tests need the machine as a whole, and the name by which xdist keeps them together.

Knows the marks through :mod:`markers`; imports no xdist.
"""

from __future__ import annotations

from typing import Literal

import pytest

from .markers import check_needs, gpu_requirement, size_limit, tier_requirement

GROUP = "multigpu"
"""Name of the xdist group: xdist appends ``@multigpu`` to the node ids of its tests."""

_WHOLE = {"gpu_model", "gpu_plan", "gpu_probe", "gpu_worker", "gpu_health", "gpu_session"}
"""Fixtures that are about every visible GPU."""

Share = Literal["none", "some", "all"]


def plain(nodeid: str) -> str:
    """The node id without xdist's group name."""
    return nodeid.removesuffix(f"@{GROUP}")


def share(item: pytest.Item) -> Share:
    """What a test needs: no GPU, some of them (``gpu(count=)``), or all that are visible."""
    if check_needs(item) is not None or not _WHOLE.isdisjoint(getattr(item, "fixturenames", ())):
        return "all"
    need = gpu_requirement(item)
    if tier_requirement(item) is not None:
        return "all"
    if need is not None:
        return "all" if need.total_vram_bytes is not None or need.nvlink else "some"
    limits = (size_limit(item, "gpu_peak_limit"), size_limit(item, "gpu_leak_limit"))
    uses = "gpu_memory" in getattr(item, "fixturenames", ())
    return "some" if uses or limits != (None, None) else "none"


def count(item: pytest.Item) -> int:
    """How many GPUs a test of share ``some`` needs."""
    need = gpu_requirement(item)
    return 1 if need is None else need.count
