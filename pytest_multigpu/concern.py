"""Is a test about GPUs at all? Imported in every run, so that it imports nothing but pytest."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

_MARKS = frozenset({"gpu", "gpu_tier", "gpu_peak_limit", "gpu_leak_limit", "check"})
FIXTURES = frozenset(
    {
        "gpu_health",
        "gpu_inventory",
        "gpu_memory",
        "gpu_model",
        "gpu_plan",
        "gpu_probe",
        "gpu_session",
        "gpu_settings",
        "gpu_worker",
    }
)


def about_gpus(item: pytest.Item) -> bool:
    """The test has a mark or a fixture of ours; ``quick`` alone says nothing of GPUs."""
    marks = {mark.name for mark in item.iter_markers()}
    return not (_MARKS.isdisjoint(marks) and FIXTURES.isdisjoint(fixtures_of(item)))


def fixtures_of(item: pytest.Item) -> Sequence[str]:
    """The fixtures that a test is given, by whatever way."""
    names: Sequence[str] = getattr(item, "fixturenames", ())
    return names
