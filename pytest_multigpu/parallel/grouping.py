"""Which tests need the machine as a whole, and so one xdist worker that has it.

Knows the marks through :mod:`markers`; imports no xdist.
"""

from __future__ import annotations

from typing import Literal

import pytest

from ..markers import check_needs, gpu_requirement, size_limit, tier_requirement

_WHOLE = {"gpu_model", "gpu_plan", "gpu_probe", "gpu_worker", "gpu_health"}
"""Fixtures that are about every visible GPU."""

Share = Literal["none", "one", "all"]


def share(item: pytest.Item) -> Share:
    """What a test needs: no GPU, one, or all that are visible."""
    fixtures = set(getattr(item, "fixturenames", ()))
    if check_needs(item) is not None or _WHOLE & fixtures or tier_requirement(item) is not None:
        return "all"
    need = gpu_requirement(item)
    if need is not None:
        several = need.count > 1 or need.total_vram_bytes is not None or need.nvlink
        return "all" if several else "one"
    limits = (size_limit(item, "gpu_peak_limit"), size_limit(item, "gpu_leak_limit"))
    return "one" if "gpu_memory" in fixtures or limits != (None, None) else "none"
