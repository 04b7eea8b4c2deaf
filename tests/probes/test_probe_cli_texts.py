"""Every file can be written from what the README and ``--help`` say: their own examples load."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pytest_multigpu
from pytest_multigpu.errors import ProbeFileError
from pytest_multigpu.probe_cli.main import main
from pytest_multigpu.probe_cli.texts import HEAD, PROBE, TRANSCRIPTS
from pytest_multigpu.probes.formats import linear_head, load_probe, native
from pytest_multigpu.probes.probe import TokenMask
from pytest_multigpu.probes.transcripts import read_transcripts

README = Path(pytest_multigpu.__file__).parents[1] / "README.md"
HIDDEN, LAYER = 8192, 22


def help_of(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_the_readme_and_the_help_have_the_same_examples(
    capsys: pytest.CaptureFixture[str],
) -> None:
    readme = README.read_text(encoding="utf-8")
    assert all(f"```json\n{text}\n```" in readme for text in (PROBE, HEAD, TRANSCRIPTS))
    converting = help_of("convert", capsys)
    assert PROBE in converting
    assert HEAD in converting
    assert TRANSCRIPTS in help_of("score", capsys)


def test_every_key_that_is_read_is_in_an_example() -> None:
    assert list(json.loads(PROBE)) == native._KEYS
    assert set(json.loads(HEAD)) == set(linear_head._KEYS) - {"target_layer_name"}
    for example in (PROBE, HEAD):
        assert list(json.loads(example)["mask"]) == [field.name for field in fields(TokenMask)]


def write_native(folder: Path, described: dict[str, Any]) -> Path:
    """The tensors that the text asks for, beside a JSON."""
    from safetensors.numpy import save_file

    tensors = {
        f"direction.{LAYER}": np.ones(HIDDEN, np.float32),
        f"mean.{LAYER}": np.zeros(HIDDEN, np.float32),
        f"scale.{LAYER}": np.full(HIDDEN, 2.0, np.float32),
    }
    save_file(tensors, folder / "probe.safetensors")
    (folder / "probe.json").write_text(json.dumps(described))
    return folder / "probe.safetensors"


def test_the_own_format(tmp_path: Path) -> None:
    probe = load_probe(write_native(tmp_path, json.loads(PROBE)))
    assert (probe.layers, probe.hidden_size, probe.site) == ((22,), 8192, "raw")
    assert probe.mask == TokenMask(left=4, right=1)
    assert (probe.aggregation, probe.threshold, probe.positive_class) == ("mean", 1.5, "deceptive")
    assert probe.model == "meta-llama/Llama-3.3-70B-Instruct"
    weight, _ = probe.affine()[0]
    assert set(weight) == {0.5}
    blocks = {**json.loads(PROBE), "index": "blocks"}
    assert load_probe(write_native(tmp_path, blocks)).layers == (23,)


@pytest.mark.parametrize("key", json.loads(PROBE))
def test_which_keys_may_be_left_out(tmp_path: Path, key: str) -> None:
    described = json.loads(PROBE)
    del described[key]
    path = write_native(tmp_path, described)
    if key in ("mask", "model", "threshold"):
        assert load_probe(path).layers == (22,)
    else:
        with pytest.raises(ProbeFileError, match=rf"probe\.json: {key}: "):
            load_probe(path)


@pytest.mark.parametrize("name", ["probe.safetensors", "probe_head.bin", "probe.pt"])
def test_a_linear_head(tmp_path: Path, name: str) -> None:
    import torch
    from safetensors.torch import save_file

    state = torch.nn.Linear(HIDDEN, 1).state_dict()
    (save_file if "safetensors" in name else torch.save)(state, tmp_path / name)
    (tmp_path / "probe_config.json").write_text(HEAD)
    probe = load_probe(tmp_path)
    assert (probe.layers, probe.threshold, probe.positive_class) == ((22,), 0.0, "hallucinated")
    (tmp_path / "probe_config.json").write_text('{"layer_idx": 21}')
    assert load_probe(tmp_path).layers == (22,)


def test_transcripts(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(TRANSCRIPTS)
    found = read_transcripts(tmp_path / "t.jsonl")
    assert [(t.name, t.label) for t in found] == [("game-1", True), ("game-2", False), ("3", None)]
    assert found[2].messages[1]["content"] == "I don't know."
