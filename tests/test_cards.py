"""The datasheets' figures: whole names only, and every card that can be simulated has one."""

from __future__ import annotations

import pytest

from pytest_multigpu.cards import MEMORY_GB_PER_S, memory_gb_per_s
from pytest_multigpu.planning.catalogue import CATALOGUE, GpuType


@pytest.mark.parametrize(
    ("name", "gb_per_s"),
    [
        ("NVIDIA H100 80GB HBM3", 3352),
        ("NVIDIA RTX A6000", 768),
        ("Tesla T4", 320),
        (" NVIDIA L4 ", None),
        ("NVIDIA L4 ", 300),
        ("NVIDIA H100", None),
    ],
)
def test_known_cards(name: str, gb_per_s: float | None) -> None:
    assert memory_gb_per_s(name) == gb_per_s


@pytest.mark.parametrize("row", CATALOGUE, ids=lambda row: row.key)
def test_a_card_to_rent_is_held_to_what_it_was_chosen_by(row: GpuType) -> None:
    assert row.bandwidth_gb_s == memory_gb_per_s(row.name)


def test_names_are_as_nvml_shows_them_less_the_maker() -> None:
    assert not [name for name in MEMORY_GB_PER_S if name != name.strip() or "NVIDIA" in name]
