"""Checkpoints that are whole, cut short, padded or contradict themselves."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from pytest_multigpu.errors import UsageError
from pytest_multigpu.machine.checkpoint import check_checkpoint, find_checkpoint


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
    assert not report.pickled
    assert report.fetch == "copy or download it again"
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
        "truncated": (f"{shard} is truncated: {size:,} of {expected:,} bytes",),
        "padded": (f"{shard} is padded: {size:,} bytes, {expected:,} expected",),
    }
    assert check_checkpoint(folder).problems == wanted[word]


def test_a_missing_shard(folder: Path) -> None:
    (folder / "model-1.safetensors").unlink()
    report = check_checkpoint(folder)
    assert report.problems == (f"{folder}/model-1.safetensors is missing",)


def test_an_index_that_names_what_the_shard_lacks(folder: Path) -> None:
    write_shard(folder / "model-1.safetensors", ["a"])
    assert check_checkpoint(folder).problems == (
        f"{folder}/model-1.safetensors lacks tensor b, named in model.safetensors.index.json",
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
    assert check_checkpoint(folder).problems == (f"{shard} {what}",)


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
    wanted = f"{shard} is damaged: its header's {what}"
    assert check_checkpoint(folder).problems == (wanted,)


def test_a_hole_between_tensors(folder: Path) -> None:
    shard = folder / "model-2.safetensors"
    entry = {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}
    text = json.dumps({"c": entry}).encode()
    shard.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    wanted = f"{shard} is damaged: tensor c begins at 4, not at 0"
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
    assert check_checkpoint(folder).problems == (f"{file} {what}",)


def test_an_index_out_of_its_folder_is_refused(folder: Path) -> None:
    file = folder / "model.safetensors.index.json"
    file.write_text('{"weight_map": {"a": "../other.safetensors"}}')
    assert check_checkpoint(folder).problems == (
        f"{file} names '../other.safetensors' for a, which is no file name",
    )


def test_no_weights_at_all_is_no_checkpoint(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "adapter_model.safetensors"):
        (tmp_path / name).write_text("{}")
    report = check_checkpoint(tmp_path)
    assert (report.found, report.problems, report.complete) == (False, (), False)


def test_one_shard_without_its_index(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    write_shard(tmp_path / "model-00001-of-00003.safetensors", ["a"])
    assert check_checkpoint(tmp_path).problems == (
        f"{tmp_path} has neither model.safetensors nor model.safetensors.index.json",
    )


def test_an_index_alone_is_a_download_broken_off(folder: Path) -> None:
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    report = check_checkpoint(folder)
    assert report.found
    assert report.problems == tuple(
        f"{folder}/model-{number}.safetensors is missing" for number in (1, 2)
    )


@pytest.fixture
def pickled(tmp_path: Path) -> Path:
    """Two shards as torch.save writes them (ZIP archives), and their index."""
    (tmp_path / "config.json").write_text("{}")
    names = [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
    index = {"weight_map": {"a": names[0], "b": names[1]}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for name in names:
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("archive/data/0", bytes(100))
    return tmp_path


def test_pickled_weights_are_found(pickled: Path) -> None:
    report = check_checkpoint(pickled)
    assert (report.problems, report.pickled, report.complete) == ((), True, True)
    assert report.files == (
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model-00002-of-00002.bin",
    )
    assert report.total_bytes == sum(file.stat().st_size for file in pickled.glob("*.bin"))
    # One file is taken before an index, as transformers does.
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x02}.")
    assert check_checkpoint(pickled).files == ("pytorch_model.bin",)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (None, "is missing"),
        (b"", "is truncated: 0 bytes"),
        (b"PK\x03\x04" + bytes(90), "is truncated: the directory at its end is missing"),
        (
            b"version https://git-lfs.github.com/spec/v1",
            "is a Git LFS pointer, not the file itself",
        ),
    ],
)
def test_damaged_pickles(pickled: Path, content: bytes | None, what: str) -> None:
    file = pickled / "pytorch_model-00002-of-00002.bin"
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    assert check_checkpoint(pickled).problems == (f"{file} {what}",)


def test_what_torch_itself_saves_is_whole(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    (tmp_path / "config.json").write_text("{}")
    file = tmp_path / "pytorch_model.bin"
    for old in (False, True):
        torch.save({"a": torch.zeros(9)}, file, _use_new_zipfile_serialization=not old)
        assert check_checkpoint(tmp_path).complete
    torch.save({"a": torch.zeros(9)}, file)
    file.write_bytes(file.read_bytes()[:-30])
    assert not check_checkpoint(tmp_path).complete


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
    report = check_checkpoint(snapshot)
    assert report.problems == (f"{snapshot}/model.safetensors is missing",)
    assert report.fetch == "hf download meta/llama"


def test_a_snapshot_with_weights_before_one_without(tmp_path: Path) -> None:
    environ = {"HF_HUB_CACHE": str(tmp_path)}
    snapshots = []
    for name in ("one", "two"):
        repository = tmp_path / f"models--meta--{name}"
        snapshots.append(repository / "snapshots" / "abc")
        snapshots[-1].mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("abc")
    ids = ["meta/one", "meta/two"]
    assert find_checkpoint("preset", environ, ids) == snapshots[0]
    (snapshots[1] / "model.safetensors.index.json").write_text("{}")
    assert find_checkpoint("preset", environ, ids) == snapshots[1]


def test_a_config_file_is_no_checkpoint(folder: Path) -> None:
    assert find_checkpoint(str(folder / "config.json"), {}) is None


def test_torch_is_not_imported(folder: Path) -> None:
    code = (
        "import sys; from pytest_multigpu.machine.checkpoint import check_checkpoint; "
        f"check_checkpoint({str(folder)!r}); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'safetensors')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
