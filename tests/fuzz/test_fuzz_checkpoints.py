"""Fuzzed safetensors headers and indexes of a model's checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fuzzing import FUZZ, JSON, TEXT, altered, damaged, files, result_or_one_line
from hypothesis import event, given
from hypothesis import strategies as st

from pytest_multigpu.machine.checkpoint import check_checkpoint

HEADER: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}
SHARD = "model-1.safetensors"
INDEX: dict[str, Any] = {"metadata": {"total_size": 32}, "weight_map": {"a": SHARD, "b": SHARD}}


def tensors(header: bytes, data: int = 32) -> bytes:
    return len(header).to_bytes(8, "little") + header + bytes(data)


def problems(folder: Path) -> tuple[str, ...]:
    report = result_or_one_line(lambda: check_checkpoint(folder))
    assert report is not None
    event("whole" if report.complete else "damage told")
    for problem in report.problems:
        assert problem.isprintable()
        problem.encode("utf-8")
    return report.problems


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("checkpoint")
    (made / "config.json").write_text("{}")
    (made / SHARD).write_bytes(tensors(json.dumps(HEADER).encode()))
    return made


@pytest.fixture
def single(folder: Path) -> Path:
    made = folder / "single"
    made.mkdir(exist_ok=True)
    (made / "config.json").write_text("{}")
    return made


def test_the_undamaged_ones_are_whole(folder: Path, single: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(INDEX))
    (single / "model.safetensors").write_bytes(tensors(json.dumps(HEADER).encode()))
    assert check_checkpoint(folder).complete
    assert check_checkpoint(single).complete


@FUZZ
@given(
    content=st.builds(tensors, files(altered(HEADER) | JSON), st.sampled_from([0, 24, 31, 32, 33]))
    | st.builds(json.dumps, altered(HEADER)).map(str.encode).map(tensors).flatmap(damaged)
    | st.binary(max_size=40)
)
def test_headers(single: Path, content: bytes) -> None:
    (single / "model.safetensors").write_bytes(content)
    problems(single)


MAPPED = st.dictionaries(TEXT, TEXT | st.just(SHARD), max_size=3).map(lambda m: {"weight_map": m})


@FUZZ
@given(content=files(altered(INDEX) | MAPPED | JSON))
def test_indexes(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors.index.json").write_bytes(content)
    problems(folder)


@FUZZ
@given(content=files(JSON))
def test_configs(single: Path, content: bytes) -> None:
    (single / "model.safetensors").write_bytes(tensors(json.dumps(HEADER).encode()))
    (single / "config.json").write_bytes(content)
    problems(single)
