"""The replay beside real GPUs: every segment that torch asked one H200 for, or two, in its order.

``benchmarks/segments.py`` records them.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pytest_multigpu.model.architecture import describe
from pytest_multigpu.model.config import resolve_config
from pytest_multigpu.planning.allocator import Allocator, Held
from pytest_multigpu.planning.balance import balanced
from pytest_multigpu.planning.costs import HOPPER, Costs
from pytest_multigpu.planning.expandable import ExpandableAllocator
from pytest_multigpu.planning.replay import Loaded
from pytest_multigpu.planning.simulate import simulate
from pytest_multigpu.records.plan import Architecture, DeviceMap, Tier
from pytest_multigpu.units import MIB

_FILE = json.loads(Path(__file__).with_name("segments_h200.json").read_text())
RECORDED: dict[str, list[int]] = _FILE["segments"]
GROWN: dict[str, list[int]] = _FILE["grown"]
"""With expandable segments: the pieces that were mapped."""
TWO_GPUS: dict[str, list[int]] = _FILE["two_gpus"]
NEW_TOKENS = 8
SMALL = 34
"""MiB. The workspace, which a process takes once and every replay; and what a search for outliers
takes, a little less where there are few tokens."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """MiB of the segments above 2 MiB that any replay asks for from here on."""
    sizes: list[int] = []
    made = Allocator._segment

    def noted(self: Allocator, size: int, small: bool) -> Held:
        segment = made(self, size, small)
        if not small:
            sizes.append(segment.size // MIB)
        return segment

    monkeypatch.setattr(Allocator, "_segment", noted)
    return sizes


@pytest.mark.parametrize("tier", ["4bit", "8bit"])
def test_every_segment_in_its_order(asked: list[int], tier: Tier) -> None:
    architecture = describe(resolve_config("llama-3.3-70b"), tier=tier)
    placed = {block.name: 0 for block in architecture.blocks}
    loaded = loaded_by_now(architecture, placed, HOPPER)
    sizes = {name.split()[1] for name in RECORDED if name.startswith(tier)}
    assert len(sizes) == 3
    for size in sorted(sizes):
        context, batch = map(int, size.split("x"))
        asked.clear()
        loaded.run(context_tokens=context, batch=batch, new_tokens=NEW_TOKENS)
        given = [*RECORDED[f"{tier} {size} generate"], *RECORDED[f"{tier} {size} probe"]]
        assert _large(asked) == _large(given), size


@pytest.mark.parametrize("context", [2048, 8192])
def test_every_segment_of_two_gpus(asked: list[int], context: int) -> None:
    """They share one range of addresses: the order is that of one GPU all the same."""
    architecture = describe(resolve_config("llama-3.3-70b"), tier="4bit")
    placed = balanced(architecture, simulate("2xH200"), context_tokens=2048, batch=1)
    loaded = loaded_by_now(architecture, placed, HOPPER)
    asked.clear()
    probed = TWO_GPUS.get(f"4bit {context}x8 probe", [])
    loaded.run(context_tokens=context, batch=8, new_tokens=NEW_TOKENS, probe=bool(probed))
    assert _large(asked) == _large([*TWO_GPUS[f"4bit {context}x8 generate"], *probed])


def loaded_by_now(architecture: Architecture, placed: DeviceMap, costs: Costs) -> Loaded:
    """What a first session took of the allocator before its prompt is done with."""
    loaded = Loaded(architecture, placed, {0: costs, 1: costs})
    loaded.run(context_tokens=1, batch=1)
    return loaded


def _large(sizes: list[int]) -> list[int]:
    return [mib for mib in sizes if mib > SMALL]


@pytest.mark.parametrize(("tier", "tolerance"), [("4bit", 0), ("8bit", 100)])
def test_every_piece_by_which_segments_grow(
    monkeypatch: pytest.MonkeyPatch, tier: Tier, tolerance: int
) -> None:
    """In 8 bit the columns with outliers differ from layer to layer: in all, some MiB."""
    asked: list[int] = []
    made = ExpandableAllocator._map

    def noted(self: ExpandableAllocator, region: Any, size: int) -> Held:
        if not region.small:
            asked.append(size // MIB)
        return made(self, region, size)

    architecture = describe(resolve_config("llama-3.3-70b"), tier=tier)
    placed = {block.name: 0 for block in architecture.blocks}
    loaded = loaded_by_now(architecture, placed, replace(HOPPER, expandable_segments=True))
    monkeypatch.setattr(ExpandableAllocator, "_map", noted)
    sizes = {name.split()[1] for name in GROWN if name.startswith(tier)}
    assert len(sizes) == 3
    for size in sorted(sizes):
        context, batch = map(int, size.split("x"))
        asked.clear()
        loaded.run(context_tokens=context, batch=batch, new_tokens=NEW_TOKENS)
        # The process had its workspace already; a replay takes it before either.
        workspace = 40
        generated, probed = (GROWN[f"{tier} {size} {phase}"] for phase in ("generate", "probe"))
        given = [workspace, *generated, workspace, *probed]
        if tolerance:
            assert abs(sum(asked) - sum(given)) <= tolerance
        else:
            assert asked == given
