"""Checkpoints that are whole, cut short, padded or contradict themselves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_multigpu.errors import UsageError
from pytest_multigpu.machine.checkpoint import check_checkpoint, find_checkpoint

AGAIN = "copy or download it again"


def write_shard(file: Path, names: list[str], *, size: int = 64) -> None:
    """A real safetensors file of F32 vectors, written from the format's description."""
    header, at = {}, 0
    for name in names:
        header[name] = {"dtype": "F32", "shape": [size // 4], "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(at))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    weight_map = {
        "a": "model-1.safetensors",
        "b": "model-1.safetensors",
        "c": "model-2.safetensors",
    }
    index = {"metadata": {"total_size": 192}, "weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    write_shard(tmp_path / "model-1.safetensors", ["a", "b"])
    write_shard(tmp_path / "model-2.safetensors", ["c"])
    return tmp_path


def test_a_whole_checkpoint(folder: Path) -> None:
    report = check_checkpoint(folder)
    assert report.problems == ()
    assert report.complete
    assert report.files == ("model-1.safetensors", "model-2.safetensors")
    assert report.tensors == 3
    shards = folder.glob("*.safetensors")
    assert report.total_bytes == sum(file.stat().st_size for file in shards)


def test_what_safetensors_itself_writes_is_whole(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    from safetensors.numpy import save_file

    arrays = {"x": numpy.zeros((3, 5), "float16"), "empty": numpy.zeros((0, 4), "int64")}
    save_file(arrays, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text("{}")
    report = check_checkpoint(tmp_path)
    assert (report.problems, report.tensors) == ((), 2)


@pytest.mark.parametrize(("change", "word"), [(-1, "truncated"), (0, ""), (1, "padded")])
def test_a_shard_to_the_byte(folder: Path, change: int, word: str) -> None:
    shard = folder / "model-2.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:change] if change < 0 else whole + bytes(change))
    size, expected = len(whole) + change, len(whole)
    wanted = {
        "": (),
        "truncated": (f"{shard} is truncated: {size:,} of {expected:,} bytes; {AGAIN}",),
        "padded": (f"{shard} is padded: {size:,} bytes, {expected:,} expected; {AGAIN}",),
    }
    assert check_checkpoint(folder).problems == wanted[word]


def test_a_missing_shard(folder: Path) -> None:
    (folder / "model-1.safetensors").unlink()
    report = check_checkpoint(folder)
    assert report.problems == (f"{folder}/model-1.safetensors is missing; {AGAIN}",)


def test_an_index_that_names_what_the_shard_lacks(folder: Path) -> None:
    write_shard(folder / "model-1.safetensors", ["a"])
    assert check_checkpoint(folder).problems == (
        f"{folder}/model-1.safetensors lacks tensor b, "
        f"named in model.safetensors.index.json; {AGAIN}",
    )


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "is truncated: 0 bytes"),
        (b"\x10", "is truncated: 1 bytes"),
        (b"\xff" * 32, "is not a safetensors file: its header length is absurd"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00",
            "is a Git LFS pointer, not the file itself",
        ),
        ((4).to_bytes(8, "little") + b"nope", "is damaged: its header is not valid JSON"),
        ((2).to_bytes(8, "little") + b"[]", "is damaged: its header is not a JSON object"),
        ((9).to_bytes(8, "little") + b"{}", "is truncated: 10 bytes, its header alone needs more"),
    ],
)
def test_damaged_headers(folder: Path, content: bytes, what: str) -> None:
    shard = folder / "model-2.safetensors"
    shard.write_bytes(content)
    assert check_checkpoint(folder).problems == (f"{shard} {what}; {AGAIN}",)


@pytest.mark.parametrize(
    ("entry", "what"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 9]}, "entry c contradicts itself"),
        ({"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}, "entry c contradicts itself"),
        ({"dtype": "F32", "shape": [2]}, "entry c is malformed"),
        (7, "entry c is malformed"),
    ],
)
def test_damaged_entries(folder: Path, entry: object, what: str) -> None:
    shard = folder / "model-2.safetensors"
    text = json.dumps({"c": entry}).encode()
    shard.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    wanted = f"{shard} is damaged: its header's {what}; {AGAIN}"
    assert check_checkpoint(folder).problems == (wanted,)


def test_a_hole_between_tensors(folder: Path) -> None:
    shard = folder / "model-2.safetensors"
    entry = {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}
    text = json.dumps({"c": entry}).encode()
    shard.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    wanted = f"{shard} is damaged: tensor c begins at 4, not at 0; {AGAIN}"
    assert check_checkpoint(folder).problems == (wanted,)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (None, "is missing"),
        ("[]", "is not a JSON object"),
        ("", "is not valid JSON (Expecting value: line 1 column 1 (char 0))"),
    ],
)
def test_the_config(folder: Path, text: str | None, what: str) -> None:
    file = folder / "config.json"
    if text is None:
        file.unlink()
    else:
        file.write_text(text)
    assert check_checkpoint(folder).problems == (f"{file} {what}; {AGAIN}",)


def test_an_index_out_of_its_folder_is_refused(folder: Path) -> None:
    file = folder / "model.safetensors.index.json"
    file.write_text('{"weight_map": {"a": "../other.safetensors"}}')
    assert check_checkpoint(folder).problems == (
        f"{file} names '../other.safetensors' for a, which is no file name; {AGAIN}",
    )


def test_no_weights_at_all(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert check_checkpoint(tmp_path).problems == (
        f"{tmp_path} has neither model.safetensors nor model.safetensors.index.json; {AGAIN}",
    )
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert check_checkpoint(tmp_path).problems == (
        f"{tmp_path} has no safetensors weights, only pytorch_model.bin; "
        "convert it with save_pretrained(safe_serialization=True)",
    )


def test_a_missing_folder_is_a_usage_error(tmp_path: Path) -> None:
    missing = tmp_path / "none"
    for ask in (lambda: check_checkpoint(missing), lambda: find_checkpoint(str(missing), {})):
        with pytest.raises(UsageError) as caught:
            ask()
        assert str(caught.value) == f"--gpu-model: no such folder: {missing}"


def test_the_hub_cache_is_looked_up_without_network(tmp_path: Path) -> None:
    repository = tmp_path / "models--meta--llama"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    environ = {"HF_HUB_CACHE": str(tmp_path)}
    assert find_checkpoint("meta/llama", environ) is None
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc\n")
    assert find_checkpoint("meta/llama", environ) == snapshot
    assert find_checkpoint("llama-preset", environ, ["other/one", "meta/llama"]) == snapshot
    assert find_checkpoint("other/one", environ) is None
    (snapshot / "model.safetensors").symlink_to(repository / "blobs" / "gone")
    (snapshot / "config.json").write_text("{}")
    assert check_checkpoint(snapshot).problems == (
        f"{snapshot}/model.safetensors is missing; hf download meta/llama",
    )


def test_torch_is_not_imported(folder: Path) -> None:
    code = (
        "import sys; from pytest_multigpu.machine.checkpoint import check_checkpoint; "
        f"check_checkpoint({str(folder)!r}); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'safetensors')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
