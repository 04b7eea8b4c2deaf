"""``--gpu-plan`` for models unlike Llama, from the command line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from pytest_multigpu import beside_plan
from pytest_multigpu.beside_plan import longest_contexts
from pytest_multigpu.options import Settings
from pytest_multigpu.planbook import PlanBook
from pytest_multigpu.planning.longest import longest_balanced
from pytest_multigpu.planning.simulate import simulate
from pytest_multigpu.records.plan import Plan

BLOOM_7B = {
    "model_type": "bloom",
    "vocab_size": 250880,
    "hidden_size": 4096,
    "n_layer": 30,
    "n_head": 32,
}


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def plan(pytester: pytest.Pytester, config: dict[str, object], *arguments: str) -> Any:
    folder = pytester.mkdir("model")
    (folder / "config.json").write_text(json.dumps(config))
    return pytester.runpytest_subprocess(
        "--gpu-plan", f"--gpu-model={folder}", "--gpu-placement=balanced", *arguments
    )


def test_eager_attention_that_does_not_fit_is_no_green(
    pytester: pytest.Pytester, tmp_path: Path
) -> None:
    """13.2 GiB of weights and 3.8 of KV fit; 32 score matrices of 8176 x 8176, 4.0 GiB in 16 bit
    and in fp32 twice that, do not. Counted as Llama's it would peak at 18.8 GiB."""
    result = plan(
        pytester,
        BLOOM_7B,
        "--gpu-simulate=1x24GiB",
        "--gpu-tier=16bit",
        "--gpu-context=8192",
        f"--gpu-report={tmp_path}",
    )
    assert result.ret == 1
    result.stdout.fnmatch_lines(
        ["* in 16bit (bfloat16, eager attention): 13.2 GiB of weights, *", "the plan does not fit"]
    )
    found = json.loads((tmp_path / "report.json").read_text())["plan"]
    (device,) = found["devices"]
    scores = 32 * 8176 * 8176
    assert device["parts"]["prefill"]["activations_bytes"] > scores * (2 + 2 + 4)
    assert found["attention"] == "eager"
    assert found["unknown"] == []


SMALL_LLAMA = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 16384,
}


def test_the_longest_context_of_every_tier_and_placement(
    pytester: pytest.Pytester, tmp_path: Path
) -> None:
    """As --gpu-plan says it one by one; only under -v, since it takes seconds."""
    machine = ("--gpu-simulate=1x3GiB", "--gpu-tier=16bit", f"--gpu-report={tmp_path}")
    result = plan(pytester, SMALL_LLAMA, *machine, "-v")
    assert result.ret == 0
    rows = json.loads((tmp_path / "report.json").read_text())["plan"]["longest"]
    assert [(row["tier"], row["placement"], row["expandable_segments"]) for row in rows] == [
        (tier, placement, grows)
        for tier in ("16bit", "8bit", "4bit")
        for placement, grows in (("auto", False), ("balanced", False), ("balanced", True))
    ]
    tokens = [row["tokens"] for row in rows]
    auto, balanced, grown = tokens[::3], tokens[1::3], tokens[2::3]
    assert balanced[0] <= balanced[1] <= balanced[2]
    assert all(more >= less for more, less in zip(grown, balanced, strict=True))
    assert grown[0] > balanced[0]
    assert 0 < balanced[0] < 16384
    found = [line.split() for line in result.outlines]
    at = found.index(["longest", "context", "auto", "balanced", "expandable", "segments"])
    by_tier = zip(("16bit", "8bit", "4bit"), auto, balanced, grown, strict=True)
    shown = [[tier, *(str(n or "-") for n in some), "tokens", "x", "1"] for tier, *some in by_tier]
    assert found[at + 1 : at + 5] == [*shown, []]
    folder = f"--gpu-model={pytester.path / 'model'}"
    common = ("--gpu-plan", folder, "--gpu-placement=balanced", *machine)
    fits = pytester.runpytest_subprocess(*common, f"--gpu-context={balanced[0]}")
    assert fits.ret == 0
    assert "longest context" not in fits.stdout.str()
    assert json.loads((tmp_path / "report.json").read_text())["plan"]["longest"] == []
    beyond = pytester.runpytest_subprocess(*common, f"--gpu-context={balanced[0] * 21 // 20}")
    assert beyond.ret == 1


def test_balanced_is_held_against_what_auto_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The balanced placement is no worse at that context: what it says must not be shorter."""
    begun: list[int] = []

    def watched(*args: Any, known: int, **others: Any) -> Plan | None:
        begun.append(known)
        return longest_balanced(*args, known=known, **others)

    monkeypatch.setattr(beside_plan, "longest_balanced", watched)
    settings = Settings(model="llama-3.2-1b", tier="4bit", batch=8)
    book = PlanBook(settings, simulate("2x3GiB"), os.environ)
    rows = longest_contexts(book)
    tokens = [row.tokens for row in rows]
    auto, balanced, grown = tokens[::3], tokens[1::3], tokens[2::3]
    assert begun == [n for pair in zip(auto, balanced, strict=True) for n in pair]
    assert all(less <= more for less, more in zip(auto, balanced, strict=True))
    assert all(less <= more for less, more in zip(balanced, grown, strict=True))
    # One tier alone is the same row for row.
    assert longest_contexts(book, ["4bit"]) == tuple(row for row in rows if row.tier == "4bit")


def test_the_allocator_of_the_environment_is_planned_for(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What by default does not fit there (tests/test_remedies.py)."""
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    result = pytester.runpytest_subprocess(
        "--gpu-plan", "--gpu-simulate=1xH100", "--gpu-tier=4bit", "--gpu-context=8192",
        "--gpu-batch=8", "--gpu-report=report",
    )  # fmt: skip
    assert result.ret == 0
    result.stdout.fnmatch_lines(
        ["peaks are those with expandable segments, which the environment asks for"]
    )
    report = json.loads((pytester.path / "report" / "report.json").read_text())
    assert report["machine"]["expandable_segments"] is True


def test_whose_prices_the_table_shows(pytester: pytest.Pytester, tmp_path: Path) -> None:
    """The built-in ones with their date; a file's without."""
    given = tmp_path / "catalogue.json"
    given.write_text('{"T4": {"price": 0.01}}')
    result = plan(
        pytester, SMALL_LLAMA, "--gpu-simulate=1xT4", f"--gpu-catalogue={given}", "--gpu-tier=fp16"
    )
    assert result.ret == 0
    asked = (
        "what to rent for 2048 tokens x 1 with --gpu-placement=balanced, the 6 cheapest of each "
        "tier; "
    )
    result.stdout.fnmatch_lines(
        [
            f"{asked}speeds are estimates",
            "prices of T4 are those of --gpu-catalogue, the others indications, "
            "guessed in 2026-11, not looked up",
            "rent *",
            "1xT4 *0.01 *",
        ],
        consecutive=True,
    )
    folder = f"--gpu-model={pytester.path / 'model'}"
    built_in = pytester.runpytest_subprocess("--gpu-plan", folder, "--gpu-simulate=1xH100")
    built_in.stdout.fnmatch_lines(
        [
            f"{asked}speeds are estimates",
            "prices are indications, guessed in 2026-11, not looked up; "
            "give yours with --gpu-catalogue",
            "rent *",
        ],
        consecutive=True,
    )
