"""Fuzzed headers of probe files: all formats that are read."""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzzing import FUZZ, JSON, altered, damaged, files, result_or_one_line
from hypothesis import given
from hypothesis import strategies as st

from pytest_multigpu.probes.formats import load_probe, save_probe
from pytest_multigpu.probes.synthetic import synthetic_probe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("probes")


def read(path: Path) -> None:
    probe = result_or_one_line(lambda: load_probe(path), begins=str(path.parent))
    if probe is not None:
        assert probe.layers


def split(content: bytes) -> tuple[Any, bytes]:
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def joined(header: bytes, rest: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + rest


@FUZZ
@given(data=st.data())
def test_safetensors_headers(folder: Path, data: st.DataObject) -> None:
    path, _ = save_probe(synthetic_probe(8, 4), folder / "native.safetensors")
    content = path.read_bytes()
    header, rest = split(content)
    if data.draw(st.booleans()):
        path.write_bytes(joined(data.draw(files(altered(header))), rest))
    else:
        path.write_bytes(data.draw(damaged(content, first=len(content) - len(rest))))
    read(path)


@FUZZ
@given(data=st.data())
def test_sidecars(folder: Path, data: st.DataObject) -> None:
    path, sidecar = save_probe(synthetic_probe(8, 4), folder / "sidecar.safetensors")
    described = json.loads(sidecar.read_text())
    sidecar.write_bytes(data.draw(files(altered(described) | JSON)))
    read(path)


def torch_head(path: Path) -> bytes:
    import torch

    torch.save({"weight": torch.ones(1, 8), "bias": torch.ones(1)}, path)
    return path.read_bytes()


HEAD_CONFIG: dict[str, Any] = {"layer_idx": 4, "hidden_size": 8, "model_name": "x"}


@FUZZ
@given(data=st.data())
def test_linear_heads(folder: Path, data: st.DataObject) -> None:
    inside = folder / "head"
    inside.mkdir(exist_ok=True)
    content = torch_head(inside / "probe.pt")
    config = inside / "probe_config.json"
    config.write_text(json.dumps(HEAD_CONFIG))
    if data.draw(st.booleans()):
        config.write_bytes(data.draw(files(altered(HEAD_CONFIG) | JSON)))
    else:
        (inside / "probe.pt").write_bytes(data.draw(damaged(content)))
    read(inside / "probe.pt")


def apollo() -> bytes:
    directions = {3: np.arange(8.0)}
    return pickle.dumps({"layers": [3], "directions": directions, "intercept": np.float64(0.5)})


def control_vector() -> bytes:
    name = b"general.architecture"
    meta = struct.pack("<Q", len(name)) + name + struct.pack("<IQ", 8, 13) + b"controlvector"
    spec = struct.pack("<Q", 11) + b"direction.3" + struct.pack("<IQIQ", 1, 8, 0, 0)
    start = b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + meta + spec
    return start + bytes(-len(start) % 32) + np.arange(8, dtype="<f4").tobytes()


@FUZZ
@given(content=damaged(apollo()))
def test_pickles(folder: Path, content: bytes) -> None:
    (folder / "detector.pt").write_bytes(content)
    read(folder / "detector.pt")


@FUZZ
@given(content=damaged(control_vector(), first=100))
def test_gguf(folder: Path, content: bytes) -> None:
    (folder / "vector.gguf").write_bytes(content)
    read(folder / "vector.gguf")
