from __future__ import annotations

import json
from pathlib import Path

import pytest

from pytest_multigpu.errors import CheckpointError
from pytest_multigpu.model.safetensors_index import checkpoint_files, read_headers


def file_with(path: Path, header: object, data: bytes = b"") -> Path:
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def test_the_same_as_safetensors_says(written: Path) -> None:
    from safetensors import safe_open

    files = checkpoint_files(written)
    assert files is not None
    headers = read_headers(files)
    names = set()
    for path in files:
        with safe_open(path, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - no mapping
                part = opened.get_slice(name)
                assert headers[name].shape == tuple(part.get_shape())
                assert headers[name].dtype == part.get_dtype()
                assert headers[name].path == str(path)
                names.add(name)
    assert names == set(headers)


def test_lengths_at_the_limit_and_one_byte_under(tmp_path: Path) -> None:
    path = file_with(tmp_path / "a.safetensors", {"w": ENTRY, "__metadata__": {}}, bytes(24))
    (tensor,) = read_headers([path]).values()
    assert (tensor.size_bytes, path.stat().st_size - tensor.offset) == (24, 24)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError) as caught:
        read_headers([path])
    assert str(caught.value) == (
        f"{path}: truncated: {size - 1} B ({size - 1} bytes) of {size} B ({size} bytes); "
        "download it again"
    )


def test_a_header_cut_short(tmp_path: Path) -> None:
    path = file_with(tmp_path / "a.safetensors", {"w": ENTRY})
    whole = path.read_bytes()
    path.write_bytes(whole[:20])
    with pytest.raises(CheckpointError, match=r"truncated: 20 B \(20 bytes\) of"):
        read_headers([path])


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "not a safetensors file; download it again"),
        (b"<html>404</html>", "not a safetensors file; download it again"),
        (b"\x04\0\0\0\0\0\0\0nope", "its header is damaged; download it again"),
        (b"\x02\0\0\0\0\0\0\0[]", "its header is damaged; download it again"),
    ],
)
def test_not_what_it_should_be(tmp_path: Path, content: bytes, text: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_headers([path])
    assert str(caught.value) == f"{path}: {text}"


def test_sizes_that_contradict_the_shape(tmp_path: Path) -> None:
    path = file_with(tmp_path / "a.safetensors", {"w": {**ENTRY, "shape": [2, 4]}}, bytes(24))
    with pytest.raises(CheckpointError) as caught:
        read_headers([path])
    assert str(caught.value) == (
        f"{path}: its header is damaged: w of shape [2, 4] in F32 takes 32 bytes, not 24; "
        "download it again"
    )


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "gone.safetensors"
    with pytest.raises(CheckpointError) as caught:
        read_headers([path])
    assert str(caught.value) == f"{path}: cannot be read: No such file or directory"


def test_an_index_without_a_weight_map(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("[]")
    with pytest.raises(CheckpointError) as caught:
        checkpoint_files(tmp_path)
    assert str(caught.value) == (
        f"{index}: not a safetensors index (no weight_map); download it again"
    )


def test_no_index_and_a_single_file(tmp_path: Path) -> None:
    assert checkpoint_files(tmp_path) is None
    single = file_with(tmp_path / "model.safetensors", {})
    assert checkpoint_files(tmp_path) == (single,)
