"""The order of a run: a sick machine shows before a minute of loading is spent on it."""

from __future__ import annotations

import pytest

from .markers import check_needs, uses_model, uses_worker, validate

CHECK_ORDER = (
    "test_machine",
    "test_interconnect",
    "test_plan",
    "test_distribution",
    "test_generation",
    "test_probe_scoring",
    "test_peak_memory",
)

QUIET = "ignore:::(?!_pytest)"
"""In shipped checks, whatever filters a project has: what torch and its kin warn of is no fault of
the machine, and nobody who rents one can mend it. This package itself reports and never warns.
What pytest says of a thread that died is left to the project's filters."""


def order(items: list[pytest.Item]) -> None:
    """Sort in place: quick checks, then what loads nothing, then whatever uses the model.

    :raises UsageError: a test's marks have wrong arguments.
    """
    for item in items:
        validate(item)
        # -p no:warnings filters nothing, and knows no such mark.
        if check_needs(item) is not None and item.config.pluginmanager.has_plugin("warnings"):
            item.add_marker(pytest.mark.filterwarnings(QUIET))
    items[:] = in_order(items)


def in_order(items: list[pytest.Item]) -> list[pytest.Item]:
    """Sorted as :func:`order` does.

    :raises UsageError: a shipped check's mark has wrong arguments.
    """
    return sorted(items, key=_place)


def _place(item: pytest.Item) -> tuple[int, int, int]:
    if check_needs(item) is None:
        return (2 if uses_model(item) else 1, 0, 0)
    name = item.path.stem
    place = CHECK_ORDER.index(name) if name in CHECK_ORDER else len(CHECK_ORDER)
    quick = item.get_closest_marker("quick") is not None
    # What does not wait for the CUDA worker runs while the worker does.
    return (0, int(uses_worker(item)), place) if quick else (2, 0, place)
