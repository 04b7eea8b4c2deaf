"""A checkpoint's fingerprint: equal for equal weights, another for others, from few bytes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pytest_multigpu.errors import CheckpointError
from pytest_multigpu.model.fingerprint import fingerprint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 1024)
    return folder


def test_a_copy_elsewhere_has_the_same(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(folder, copy)
    (copy / "config.json").write_text("{}")
    assert fingerprint(copy) == fingerprint(folder)


@pytest.mark.parametrize("at", [0, 100_000, -1])
def test_other_weights_have_another(folder: Path, at: int) -> None:
    """At the start, in the middle, at the very end."""
    before = fingerprint(folder)
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    middle = slice(at, at + 20_000) if at > 0 else slice(at, (at + 1) or None)
    data[middle] = bytes(255 - value for value in data[middle])
    file.write_bytes(bytes(data))
    assert fingerprint(folder) != before


def test_another_length_or_name_is_another(folder: Path) -> None:
    found = {fingerprint(folder)}
    file = folder / "model.safetensors"
    with file.open("ab") as stream:
        stream.write(b"x")
    found.add(fingerprint(folder))
    file.rename(folder / "pytorch_model.bin")
    found.add(fingerprint(folder))
    assert len(found) == 3


def test_small_and_empty_files(folder: Path) -> None:
    file = folder / "model.safetensors"
    found = set()
    for content in (b"", b"a", b"b", b"a" * 4096, b"a" * 4097):
        file.write_bytes(content)
        found.add(fingerprint(folder))
    assert len(found) == 5


def test_no_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        fingerprint(tmp_path)
    assert str(error.value) == f"{tmp_path}: holds no weights"
