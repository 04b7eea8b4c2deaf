"""What the environment says about torch's allocator."""

from __future__ import annotations

import pytest

from pytest_multigpu.machine import torch_allocator
from pytest_multigpu.machine.torch_allocator import (
    cuts_large_blocks,
    expandable_segments,
    unlike_planned,
)

NEW, OLD, UNCACHED = (
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_NO_CUDA_MEMORY_CACHING",
)
GROWS = "expandable_segments:True"
TOLD = (
    ": peaks are predicted for torch's allocator as it is by default or with "
    "expandable_segments:True alone"
)


@pytest.mark.parametrize(
    ("environ", "grows"),
    [
        ({}, False),
        ({NEW: " "}, False),
        ({NEW: "expandable_segments:False"}, False),
        ({NEW: "pinned_use_background_threads:True"}, False),
        ({NEW: GROWS}, True),
        ({OLD: GROWS}, True),
        ({NEW: GROWS, OLD: GROWS}, True),
        ({NEW: f" {GROWS} , pinned_num_register_threads:4,"}, True),
    ],
)
def test_what_a_plan_follows(environ: dict[str, str], grows: bool) -> None:
    assert expandable_segments(environ) is grows
    assert unlike_planned(environ) is None


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({NEW: f"{GROWS},max_split_size_mb:64"}, f"{NEW}={GROWS},max_split_size_mb:64"),
        ({OLD: "garbage_collection_threshold:0.8"}, f"{OLD}=garbage_collection_threshold:0.8"),
        ({NEW: "backend:cudaMallocAsync"}, f"{NEW}=backend:cudaMallocAsync"),
        # torch itself takes no other spelling.
        ({NEW: "Expandable_Segments:TRUE"}, f"{NEW}=Expandable_Segments:TRUE"),
        ({NEW: f"{GROWS},expandable_segments:False"}, f"{NEW}={GROWS},expandable_segments:False"),
        # Which of the two counts is the torch version's to say.
        (
            {OLD: GROWS, NEW: "expandable_segments:False"},
            f"{NEW}=expandable_segments:False {OLD}={GROWS}",
        ),
        ({UNCACHED: "1"}, f"{UNCACHED}=1"),
        ({UNCACHED: "1", NEW: GROWS}, f"{NEW}={GROWS} {UNCACHED}=1"),
    ],
)
def test_what_no_plan_follows_is_named(environ: dict[str, str], named: str) -> None:
    assert expandable_segments(environ) is False
    assert unlike_planned(environ) == named + TOLD


def test_blocks_that_are_never_cut() -> None:
    assert cuts_large_blocks({})
    assert cuts_large_blocks({NEW: GROWS, OLD: "garbage_collection_threshold:0.8"})
    for name in (NEW, OLD):
        assert not cuts_large_blocks({name: f"{GROWS},max_split_size_mb:64"})


@pytest.mark.parametrize(
    ("version", "known"),
    [("2.9.1+cu128", False), ("2.4.1", False), ("2.10.0", True), ("2.11.0+cu130", True),
     ("3.0.0", True), ("git", True), (None, True)],
)  # fmt: skip
def test_a_name_that_the_installed_torch_does_not_read(
    version: str | None, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {} if version is None else {"torch": version}
    monkeypatch.setattr(torch_allocator, "installed_versions", lambda *_: found)
    assert expandable_segments({NEW: GROWS}) is known
    assert expandable_segments({OLD: GROWS}) is True
    assert expandable_segments({NEW: "max_split_size_mb:64", OLD: GROWS}) is not known
    assert cuts_large_blocks({NEW: "max_split_size_mb:64"}) is not known
    ignored = (
        f"{NEW}={GROWS}: torch {version} does not read it for CUDA; set PYTORCH_CUDA_ALLOC_CONF"
    )
    assert unlike_planned({NEW: GROWS}) == (None if known else ignored)
    assert unlike_planned({NEW: GROWS, OLD: GROWS}) is None
