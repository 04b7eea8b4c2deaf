"""The replay beside a real GPU: every segment that torch asked one H200 for, in its order.

``benchmarks/segments.py`` records them.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pytest_multigpu.model.architecture import describe
from pytest_multigpu.model.config import resolve_config
from pytest_multigpu.planning.allocator import Allocator, Held
from pytest_multigpu.planning.costs import HOPPER
from pytest_multigpu.planning.replay import Loaded
from pytest_multigpu.units import MIB

RECORDED: dict[str, list[int]] = json.loads(
    Path(__file__).with_name("segments_h200.json").read_text()
)["segments"]
NEW_TOKENS = 8
SMALL = 34
"""MiB. The workspace, which a process takes once and every replay; and what a search for outliers
takes, a little less where there are few tokens."""


@pytest.mark.parametrize("tier", ["4bit", "8bit"])
def test_every_segment_in_its_order(monkeypatch: pytest.MonkeyPatch, tier: str) -> None:
    asked: list[int] = []
    made = Allocator._segment

    def noted(self: Allocator, size: int, small: bool) -> Held:
        segment = made(self, size, small)
        if not small:
            asked.append(segment.size // MIB)
        return segment

    architecture = describe(resolve_config("llama-3.3-70b"), tier=tier)  # type: ignore[arg-type]
    placed = {block.name: 0 for block in architecture.blocks}
    loaded = Loaded(architecture, placed, {0: HOPPER})
    monkeypatch.setattr(Allocator, "_segment", noted)
    sizes = {name.split()[1] for name in RECORDED if name.startswith(tier)}
    assert len(sizes) == 3
    for size in sorted(sizes):
        context, batch = map(int, size.split("x"))
        asked.clear()
        loaded.run(context_tokens=context, batch=batch, new_tokens=NEW_TOKENS)
        given = [*RECORDED[f"{tier} {size} generate"], *RECORDED[f"{tier} {size} probe"]]
        assert [mib for mib in asked if mib > SMALL] == [mib for mib in given if mib > SMALL], size
