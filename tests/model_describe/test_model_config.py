from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

from pytest_multigpu.errors import UsageError
from pytest_multigpu.machine.host import hub_cache
from pytest_multigpu.model.config import preset_config, resolve_config
from pytest_multigpu.presets import PRESETS

CONFIG = {"model_type": "llama", "hidden_size": 64}
NAMES = ", ".join(PRESETS)
REMEDY = "give a preset's name or the path of a folder with a config.json"


def cached(home: Path, hub_id: str, files: dict[str, str]) -> Path:
    """A hub cache with one snapshot of ``hub_id``; returns the snapshot."""
    repository = home / "huggingface" / "hub" / f"models--{hub_id.replace('/', '--')}"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    for name, text in files.items():
        (snapshot / name).write_text(text)
    return snapshot


def test_a_preset_needs_nothing_else() -> None:
    resolved = resolve_config("Llama-3.3-70B")
    assert resolved.name == "Llama-3.3-70B"
    assert resolved.config_dict == PRESETS["llama-3.3-70b"]
    assert resolved.checkpoint is None
    assert preset_config("llama-3.3-70b").config_dict == resolved.config_dict


def test_what_a_caller_does_to_a_preset_is_not_seen_by_the_next() -> None:
    first = resolve_config("llama-3.3-70b").config_dict
    first["rope_scaling"]["factor"] = 1.0
    assert resolve_config("llama-3.3-70b").config_dict["rope_scaling"]["factor"] == 8.0
    assert resolve_config("llama-3.1-70b").config_dict["rope_scaling"]["factor"] == 8.0


def test_a_preset_finds_its_whole_checkpoint_in_the_cache(cache_home: Path) -> None:
    snapshot = cached(
        cache_home,
        "meta-llama/Llama-3.2-1B-Instruct",
        {"config.json": json.dumps(CONFIG), "model.safetensors": ""},
    )
    resolved = resolve_config("llama-3.2-1b")
    assert resolved.checkpoint == snapshot
    assert resolved.config_dict == CONFIG


@pytest.mark.parametrize("missing", [False, True])
def test_a_half_downloaded_checkpoint_counts_as_absent(cache_home: Path, missing: bool) -> None:
    index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    files = {
        "config.json": json.dumps(CONFIG),
        "model.safetensors.index.json": json.dumps(index),
        "1.safetensors": "",
    }
    if not missing:
        files["2.safetensors"] = ""
    snapshot = cached(cache_home, "foo/bar", files)
    resolved = resolve_config("foo/bar")
    assert resolved.config_dict == CONFIG
    assert resolved.checkpoint == (None if missing else snapshot)


def test_a_folder_with_weights_is_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert resolve_config(str(tmp_path)).checkpoint is None
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    resolved = resolve_config(str(tmp_path))
    assert resolved.checkpoint == tmp_path
    assert resolved.config_dict == CONFIG


def test_a_config_file_alone(tmp_path: Path) -> None:
    file = tmp_path / "other.json"
    file.write_text(json.dumps(CONFIG))
    resolved = resolve_config(str(file))
    assert (resolved.config_dict, resolved.checkpoint) == (CONFIG, None)


def test_where_the_hub_cache_is() -> None:
    assert hub_cache({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}) == Path("/a")
    assert hub_cache({"HF_HOME": "/b", "XDG_CACHE_HOME": "/c"}) == Path("/b/hub")
    assert hub_cache({"XDG_CACHE_HOME": "/c"}) == Path("/c/huggingface/hub")
    assert hub_cache({}) == Path.home() / ".cache/huggingface/hub"


@pytest.mark.parametrize("model", ["/no/such/folder", "./nothing", "~/nothing-of-that-name"])
def test_a_missing_path(model: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve_config(model)
    assert str(caught.value) == f"--gpu-model: there is no folder {model!r}; {REMEDY}"


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        ("~nobody-of-that-name/x", "Could not determine home directory."),
        # As a folder that may not be entered: the system does not tell.
        ("/" + "a" * 300, "File name too long"),
    ],
)
def test_a_path_that_cannot_be_looked_at(model: str, complaint: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve_config(model)
    assert str(caught.value) == f"--gpu-model: {model!r}: {complaint}; {REMEDY}"


def test_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        resolve_config(str(tmp_path))
    assert str(caught.value) == (
        f"--gpu-model: the folder {str(tmp_path)!r} has no config.json; {REMEDY}"
    )


DEEP = b'{"model_type": ' + b"[" * 100_000


def why_not(content: bytes) -> str:
    """In Python's own words."""
    with pytest.raises(RecursionError) as caught:
        json.loads(content)
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (
            b'{"model_type": }',
            "is not valid JSON (line 1, column 16: Expecting value); download it again or "
            "correct it",
        ),
        (b"[]", f"is not a JSON object; {REMEDY}"),
        (
            DEEP,
            f"cannot be read as JSON: {why_not(DEEP)}; download it again or correct it",
        ),
        (b"{}", "has no 'model_type'; it must be a transformers model's config.json"),
        (b"\xff", f"is not UTF-8 text; {REMEDY}"),
    ],
)
def test_a_bad_config_file(tmp_path: Path, content: bytes, complaint: str) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        resolve_config(str(tmp_path))
    assert str(caught.value) == f"--gpu-model: {file} {complaint}"


def test_a_mistyped_preset_does_not_ask_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*_: object, **__: object) -> NoReturn:
        pytest.fail("asked the hub")

    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", ask)
    with pytest.raises(UsageError) as caught:
        resolve_config("llama-70b")
    assert str(caught.value) == (
        f"--gpu-model: 'llama-70b' is neither a preset ({NAMES}), a folder nor a model in the "
        f"Hugging Face cache; {REMEDY}"
    )


def test_the_hub_is_asked_last(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "downloaded.json"
    file.write_text(json.dumps(CONFIG))
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(file))
    assert resolve_config("foo/bar").config_dict == CONFIG


def test_the_hub_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> NoReturn:
        raise ConnectionError("a\nlong story")

    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(UsageError) as caught:
        resolve_config("foo/bar")
    assert str(caught.value) == (
        f"--gpu-model: 'foo/bar' is neither a preset ({NAMES}), a folder nor a model in the "
        f"Hugging Face cache, and the hub did not give it (ConnectionError); {REMEDY}, or log in "
        f"with 'hf auth login' if the model is gated"
    )


def test_presets_and_paths_import_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    code = (
        "import sys\n"
        "import pytest_multigpu.model.architecture, pytest_multigpu.model.automap\n"
        "from pytest_multigpu.model.config import resolve_config\n"
        f"resolve_config('llama-3.3-70b'); resolve_config({str(tmp_path)!r})\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pynvml', 'huggingface_hub', 'pytest'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
