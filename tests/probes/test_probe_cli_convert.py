"""``python -m pytest_multigpu.probes convert``."""

from __future__ import annotations

import dataclasses
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pytest_multigpu.probe_cli.main import main
from pytest_multigpu.probes.formats import load_probe, save_probe
from pytest_multigpu.probes.formats.writing import write_probe
from pytest_multigpu.probes.probe import TokenMask
from pytest_multigpu.probes.synthetic import synthetic_probe

Convert = Callable[..., "tuple[int, str, str]"]


@pytest.fixture
def convert(capsys: pytest.CaptureFixture[str]) -> Convert:
    """Exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main(["convert", *map(str, arguments)])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def apollo(path: Path, layers: list[int], **more: Any) -> Path:
    """A detector as published: no JSON, and the layer's number only inside."""
    import torch

    directions = torch.randn(len(layers), 8, generator=torch.Generator().manual_seed(0))
    path.write_bytes(pickle.dumps({"layers": layers, "directions": directions, **more}))
    return path


def test_to_the_own_format(convert: Convert, tmp_path: Path) -> None:
    source = apollo(tmp_path / "detector.pt", [22])
    target = tmp_path / "out.safetensors"
    assert convert(source, target, "--site", "raw", "--aggregation", "max") == (
        0,
        f"{source}: apollo, hidden_states 22, site raw\n"
        f"written: {target} and {tmp_path / 'out.json'}\n",
        "",
    )
    probe = load_probe(target)
    assert (probe.site, probe.aggregation) == ("raw", "max")
    changed = dataclasses.replace(load_probe(source), site="raw", aggregation="max")
    assert probe.same_as(changed)


def test_another_layer(convert: Convert, tmp_path: Path) -> None:
    """Neither an Apollo pickle nor the own JSON could be edited for it: the tensors' names count
    the layer too."""
    source = apollo(tmp_path / "detector.pt", [22])
    target = tmp_path / "moved.safetensors"
    assert convert(source, target, "--layer", 23)[0] == 0
    assert load_probe(target).layers == (23,)
    assert load_probe(target).digest != load_probe(source).digest
    # And onto itself.
    assert convert(target, target, "--layer", 21)[0] == 0
    moved = load_probe(target)
    assert moved.same_as(dataclasses.replace(load_probe(source), layers=(21,)))
    two = apollo(tmp_path / "two.pt", [3, 5])
    assert convert(two, target, "--layer", "5=6", "--layer", "3=0")[0] == 0
    assert load_probe(target).layers == (0, 6)


@pytest.mark.parametrize(
    ("layers", "text", "reason"),
    [
        ([22], "x", "'x' is not a layer; write N, or OLD=NEW"),
        ([22], "-1", "'-1' is not a layer; write N, or OLD=NEW"),
        ([22], "=3", "'=3' is not a layer; write N, or OLD=NEW"),
        ([22], "3=", "'3=' is not a layer; write N, or OLD=NEW"),
        ([22], "1=2=3", "'1=2=3' is not a layer; write N, or OLD=NEW"),
        ([22], "9" * 5000, f"'{'9' * 5000}' is not a layer; write N, or OLD=NEW"),
        ([3, 5], "4", "the probe reads layers 3, 5; write OLD=4"),
        ([3, 5], "4=6", "the probe does not read layer 4, but 3, 5"),
    ],
)
def test_layers_that_cannot_be(
    convert: Convert, tmp_path: Path, layers: list[int], text: str, reason: str
) -> None:
    source = apollo(tmp_path / "detector.pt", layers)
    assert convert(source, tmp_path / "out.safetensors", f"--layer={text}") == (
        2,
        "",
        f"error: --layer: {reason}\n",
    )
    assert list(tmp_path.iterdir()) == [source]


def test_a_layer_that_the_probe_reads_already(convert: Convert, tmp_path: Path) -> None:
    source = apollo(tmp_path / "detector.pt", [3, 5])
    code, _, error = convert(source, tmp_path / "out.safetensors", "--layer", "3=5")
    assert (code, error) == (
        2,
        f"error: {source}: layers: [5, 5] names a layer twice; fix it or export the probe again\n",
    )


def test_fold_and_lossy(convert: Convert, tmp_path: Path) -> None:
    import torch

    scaler = {"scaler_mean": torch.ones(1, 8), "scaler_scale": torch.full((1, 8), 2.0)}
    source = apollo(tmp_path / "detector.pt", [22], normalize=True, **scaler)
    code, _, error = convert(source, tmp_path / "head")
    assert code == 2
    assert "can't carry mean and scale, and would score otherwise; --fold puts" in error
    assert convert(source, tmp_path / "head", "--fold")[0] == 0
    folded = load_probe(tmp_path / "head")
    direction = load_probe(source).directions[0]
    assert np.allclose(folded.directions[0], direction / 2)
    assert folded.bias == pytest.approx(-float(direction.sum()) / 2)
    plain = apollo(tmp_path / "plain.pt", [22, 23])
    assert "; --lossy leaves that out" not in convert(plain, tmp_path / "p.gguf")[2]
    mask = TokenMask()
    vector = dataclasses.replace(load_probe(plain), mask=mask, threshold=1.0)
    write_probe(vector, tmp_path / "own.safetensors")
    assert convert(tmp_path / "own.safetensors", tmp_path / "p.gguf")[0] == 2
    assert convert(tmp_path / "own.safetensors", tmp_path / "p.gguf", "--lossy")[0] == 0
    assert load_probe(tmp_path / "p.gguf").digest == vector.digest


@pytest.mark.parametrize("name", ["model.safetensors", "detector.pt", "vector.gguf"])
def test_what_is_there_and_is_no_probe_stays(convert: Convert, tmp_path: Path, name: str) -> None:
    source = apollo(tmp_path / "source.pt", [22])
    (tmp_path / name).write_bytes(b"a checkpoint of 141 GB")
    code, _, error = convert(source, tmp_path / name)
    assert (code, error) == (
        2,
        f"error: {tmp_path / name}: is there and is no probe's; choose another name\n",
    )
    assert (tmp_path / name).read_bytes() == b"a checkpoint of 141 GB"
    # A game's JSON where the description would be.
    (tmp_path / "game.json").write_text("{}")
    code, _, error = convert(source, tmp_path / "game.safetensors")
    assert (code, error) == (
        2,
        f"error: {tmp_path / 'game.json'}: is there and is no probe's; choose another name\n",
    )
    assert (tmp_path / "game.json").read_text() == "{}"


@pytest.mark.parametrize("name", ["o.safetensors", "o.pt", "o.gguf", "o"])
@pytest.mark.parametrize(
    ("folder", "reason"),
    [
        ("no", "No such file or directory"),
        ("file", "Not a directory"),
        ("x" * 300, "File name too long"),
        # As root nothing else refuses to be written to.
        ("/proc/1", "No such file or directory"),
    ],
)
def test_places_that_cannot_be_written_to(
    convert: Convert, tmp_path: Path, name: str, folder: str, reason: str
) -> None:
    mask = TokenMask()
    probe = synthetic_probe(8, 4, layers=(3,), mask=mask)
    save_probe(dataclasses.replace(probe, positive_class="positive"), tmp_path / "p.safetensors")
    (tmp_path / "file").write_text("")
    target = tmp_path / folder / name
    code, out, error = convert(tmp_path / "p.safetensors", target, "--lossy")
    if name == "o.pt":  # it can't carry the mask, which is known only once it is written
        assert (code, out) == (2, "")
    assert (code, out, error) == (
        2,
        "",
        f"error: {target}: cannot be written: {reason}; choose another place\n",
    )


def test_as_a_command(tmp_path: Path) -> None:
    """As people start it; and a bad file is a line, not a traceback."""
    source = apollo(tmp_path / "detector.pt", [22])
    command = [sys.executable, "-m", "pytest_multigpu.probes", "convert", str(source)]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

    def run(target: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, str(tmp_path / target)],
            capture_output=True,
            text=True,
            check=False,
            env=environ,
        )

    assert run("out.safetensors").returncode == 0
    assert (tmp_path / "out.json").is_file()
    source.write_bytes(b"\x80\x02damaged")
    done = run("again.safetensors")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {source}: ")
    assert done.stderr.count("\n") == 1
