from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import version as installed
from pathlib import Path

import pytest

from pytest_multigpu.model import architecture, automap, cache
from pytest_multigpu.model.architecture import describe
from pytest_multigpu.model.automap import auto_device_map, search_max_memory
from pytest_multigpu.model.config import ResolvedModel, preset_config, resolve_config
from pytest_multigpu.records.automap import Planner
from pytest_multigpu.records.plan import MaxMemory, Tier

TINY = preset_config("tiny-llama")


def entries(home: Path) -> list[Path]:
    return sorted((home / "pytest-multigpu").glob("*"))


def fail(*_: object, **__: object) -> None:
    pytest.fail("computed again")


def test_where_it_is() -> None:
    assert cache.folder({"XDG_CACHE_HOME": "/x"}) == Path("/x/pytest-multigpu")
    assert cache.folder({"XDG_CACHE_HOME": ""}) == Path.home() / ".cache/pytest-multigpu"


def test_the_second_answer_is_the_first(cache_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def both() -> tuple[object, object]:
        return (
            describe(TINY, tier="4bit"),
            auto_device_map(TINY, tier="4bit", free_bytes={0: 9000, 1: 10**6}, cpu_bytes=10**9),
        )

    first = both()
    assert len(entries(cache_home)) == 2
    monkeypatch.setattr(architecture, "build_meta_model", fail)
    monkeypatch.setattr(automap, "build_meta_model", fail)
    assert both() == first


@pytest.mark.parametrize("caps", [None, {}, {0: "36GiB", 1: 123}])
def test_a_max_memory_is_kept_and_that_there_is_none(
    cache_home: Path, monkeypatch: pytest.MonkeyPatch, caps: MaxMemory | None
) -> None:
    searched: list[object] = []

    def search(planner: Planner) -> MaxMemory | None:
        searched.append(planner)
        return caps

    def ask(*, tier: Tier = "16bit", place: int = 0) -> MaxMemory | None:
        return search_max_memory(
            TINY, tier=tier, dtype="bfloat16", target={"": place}, search=search
        )

    assert ask() == ask() == caps
    assert len(searched) == len(entries(cache_home)) == 1
    ask(place=1)
    ask(tier="8bit")
    assert len(searched) == len(entries(cache_home)) == 3
    monkeypatch.setattr(automap, "build_meta_model", fail)
    assert ask() == caps


def test_the_name_is_not_part_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    describe(TINY, tier="16bit")
    monkeypatch.setattr(architecture, "build_meta_model", fail)
    other = ResolvedModel(name="other", config_dict=TINY.config_dict)
    assert describe(other, tier="16bit").model == "other"


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", '{"blocks": 1, "unknown": []}'])
def test_a_damaged_entry_is_computed_again(cache_home: Path, damage: str) -> None:
    first = describe(TINY, tier="16bit")
    (entry,) = entries(cache_home)
    whole = entry.read_text()
    entry.write_text(damage)
    assert describe(TINY, tier="16bit") == first
    assert entry.read_text() == whole


@pytest.mark.parametrize("library", cache._LIBRARIES)
def test_every_librarys_version_counts(
    cache_home: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    describe(TINY, tier="16bit")

    def newer(name: str) -> str:
        return "999" if name == library else installed(name)

    monkeypatch.setattr(cache, "version", newer)
    describe(TINY, tier="16bit")
    assert len(entries(cache_home)) == 2


def test_every_input_counts(cache_home: Path) -> None:
    free = {0: 10**6}
    describe(TINY, tier="16bit")
    describe(TINY, tier="8bit")
    describe(TINY, tier="16bit", dtype="float16")
    describe(TINY, tier="4bit")
    describe(TINY, tier="4bit", double_quant=True)
    describe(preset_config("llama-3.2-1b"), tier="16bit")
    auto_device_map(TINY, tier="16bit", free_bytes=free, cpu_bytes=10**9)
    auto_device_map(TINY, tier="16bit", free_bytes={0: 10**6 + 1}, cpu_bytes=10**9)
    auto_device_map(TINY, tier="16bit", free_bytes=free, cpu_bytes=10**9 + 1)
    auto_device_map(TINY, tier="16bit", free_bytes=free, cpu_bytes=10**9, caps={0: 5})
    auto_device_map(TINY, tier="16bit", free_bytes=free, cpu_bytes=10**9, caps={"cpu": 5})
    assert len(entries(cache_home)) == 11


def test_a_folder_that_cannot_be_made_means_no_cache(cache_home: Path) -> None:
    cache_home.write_text("a file where the folder would be")
    assert describe(TINY, tier="16bit") == describe(TINY, tier="16bit")


def test_a_broken_write_leaves_nothing(cache_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(json, "dump", full)
    describe(TINY, tier="16bit")
    assert entries(cache_home) == []


def test_a_warm_plan_imports_neither_torch_nor_transformers() -> None:
    free = {0: 79 << 30}
    describe(resolve_config("llama-3.3-70b"), tier="4bit")
    auto_device_map(
        resolve_config("llama-3.3-70b"), tier="4bit", free_bytes=free, cpu_bytes=1 << 30
    )
    code = (
        "import sys\n"
        "from pytest_multigpu.model.architecture import describe\n"
        "from pytest_multigpu.model.automap import auto_device_map\n"
        "from pytest_multigpu.model.config import resolve_config\n"
        "model = resolve_config('llama-3.3-70b')\n"
        "assert describe(model, tier='4bit').weights_bytes == 42709076992\n"
        "found = auto_device_map(model, tier='4bit', free_bytes={0: 79 << 30}, "
        "cpu_bytes=1 << 30)\n"
        "assert found.refusal is None\n"
        "heavy = {'torch', 'transformers', 'numpy', 'accelerate', 'bitsandbytes'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_module_that_describes_a_model_counts() -> None:
    """Not what the configuration comes from, which is an input of its own, nor what bitsandbytes is
    imported with."""
    folder = Path(cache.__file__).parent
    known = {*cache._RULES, "config.py", "bitsandbytes_import.py"}
    for name in cache._RULES:
        source = (folder / name).read_text()
        siblings = re.findall(r"^ *from \.(\w+) import", source, re.MULTILINE)
        if not name.startswith(".."):
            assert {f"{sibling}.py" for sibling in siblings} <= known, name
