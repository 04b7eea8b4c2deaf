"""What to rent and the longest contexts are kept on disk, and anew where anything that they depend
on is another."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pytest_multigpu import beside_plan
from pytest_multigpu.beside_plan import longest_contexts, rentable
from pytest_multigpu.model import cache
from pytest_multigpu.options import Settings
from pytest_multigpu.planbook import PlanBook
from pytest_multigpu.planning.simulate import simulate

ASKED = Settings(model="tiny-llama", context=64)


@pytest.fixture(autouse=True)
def home(tmp_path: Path) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        yield tmp_path / "cache" / "pytest-multigpu"


def book(settings: Settings = ASKED) -> PlanBook:
    return PlanBook(settings, simulate("1xH100"), os.environ)


def test_the_second_answer_is_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    first = rentable(book())
    assert {row.tier for row in first} == {"16bit", "8bit", "4bit"}

    def fail(*_: object, **__: object) -> None:
        pytest.fail("computed again")

    monkeypatch.setattr(beside_plan, "rent_table", fail)
    assert rentable(book()) == first


def test_all_that_it_depends_on_is_in_the_key(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = tmp_path / "catalogue.json"
    given.write_text(json.dumps({"H100": {"price": 0.01}}))
    first = rentable(book())
    assert rentable(book(replace(ASKED, catalogue=given)))[0].gpu == "H100"
    rentable(book(replace(ASKED, context=65)))
    rentable(book(replace(ASKED, batch=2)))
    rentable(book(replace(ASKED, dtype="float16")))
    rentable(book(replace(ASKED, model="llama-3.2-1b")))
    assert len(list(home.glob("rent-*"))) == 6
    # A planner that plans otherwise.
    files = cache._planning()
    assert {file.parent.name for file in files} == {"planning", "records", "pytest_multigpu"}
    assert {"rent.py", "replay.py", "costs.py", "speed.py"} <= {file.name for file in files}
    changed = tmp_path / "rent.py"
    changed.write_text("another rule")
    monkeypatch.setattr(cache, "_planning", lambda: [*files[1:], changed])
    assert rentable(book()) == first
    assert len(list(home.glob("rent-*"))) == 7


@pytest.mark.parametrize("damage", ["", "{}", '{"rows": [{"gpu": "H100"}]}'])
def test_a_damaged_entry_is_computed_again(home: Path, damage: str) -> None:
    first = rentable(book())
    (entry,) = home.glob("rent-*")
    entry.write_text(damage)
    assert rentable(book()) == first


def test_the_longest_contexts_are_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = longest_contexts(book())
    assert len(first) == 9

    def fail(*_: object, **__: object) -> None:
        pytest.fail("looked for again")

    monkeypatch.setattr(beside_plan, "longest_balanced", fail)
    monkeypatch.setattr(beside_plan, "largest_context", fail)
    assert longest_contexts(book()) == first


def test_all_that_the_longest_contexts_depend_on_is_in_the_key(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = simulate("1xH100")
    (gpu,) = machine.gpus
    grows = replace(machine, expandable_segments=True)
    older = replace(machine, gpus=(replace(gpu, capability=(8, 0)),))
    fuller = replace(machine, gpus=(replace(gpu, free_bytes=gpu.free_bytes - 1),))
    asked = replace(ASKED, tier="16bit")
    books = [
        book(asked),
        book(replace(asked, context=65)),
        book(replace(asked, batch=2)),
        book(replace(asked, dtype="float16")),
        book(replace(asked, model="llama-3.2-1b")),
        book(replace(asked, placement="balanced")),
        *(PlanBook(asked, other, os.environ) for other in (grows, older, fuller)),
    ]
    for number, one in enumerate(books, 1):
        longest_contexts(one, ["16bit"])
        assert len(list(home.glob("longest-*"))) == number
    longest_contexts(book(asked), ["4bit"])
    monkeypatch.setattr(PlanBook, "weights", "checkpoint")
    longest_contexts(book(asked), ["16bit"])
    monkeypatch.setattr(cache, "_planning", lambda: [Path(__file__)])
    longest_contexts(book(asked), ["16bit"])
    assert len(list(home.glob("longest-*"))) == len(books) + 3
    longest_contexts(book(asked), ["16bit"])
    assert len(list(home.glob("longest-*"))) == len(books) + 3
