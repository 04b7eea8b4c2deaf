"""A probe in every format that can carry it, read back as it was; what would be lost is refused."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pytest_multigpu.errors import ProbeFileError
from pytest_multigpu.probes.formats import load_probe
from pytest_multigpu.probes.formats.writing import write_probe
from pytest_multigpu.probes.probe import Probe, TokenMask
from pytest_multigpu.probes.reference import reference_scores, relative_error
from pytest_multigpu.probes.synthetic import synthetic_probe

HIDDEN = 16


def probe_of(layers: tuple[int, ...] = (3, 5), *, seed: int = 0, **fields: Any) -> Probe:
    """Deceptive is positive, as Apollo's; the assistant's texts alone, as most."""
    made = synthetic_probe(HIDDEN, 8, layers=layers, seed=seed, mask=TokenMask())
    return dataclasses.replace(made, **{"positive_class": "deceptive", **fields})


def scaler(layers: int = 2, kind: Any = np.float32) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    return {
        "mean": tuple(rng.standard_normal(HIDDEN).astype(kind) for _ in range(layers)),
        "scale": tuple((rng.random(HIDDEN) + 0.5).astype(kind) for _ in range(layers)),
        "normalize": True,
    }


PUBLISHED = TokenMask(left=4, right=1)
ONE = np.random.default_rng(2).standard_normal(HIDDEN)
CARRIED = {
    "native": (
        "p.safetensors",
        probe_of(
            (0, 7),
            **scaler(kind=np.float64),
            site="final_norm",
            bias=0.1,
            threshold=2.0,
            aggregation="last",
            mask=TokenMask(roles=("user", "tool"), left=1, exclude_last=3),
            model="acme/Tiny",
        ),
    ),
    "apollo": ("p.pt", probe_of(mask=PUBLISHED)),
    "apollo, one layer": ("p.pt", probe_of((22,), mask=PUBLISHED, site="final_norm")),
    "apollo, float64": (
        "p.pt",
        probe_of((22,), directions=(ONE,), mask=PUBLISHED, site="final_norm"),
    ),
    "apollo, scaler": ("p.pt", probe_of(mask=PUBLISHED, **scaler())),
    "apollo, scaler for the size": (
        "p.pt",
        probe_of(mask=PUBLISHED, **{**scaler(), "normalize": False}),
    ),
    "apollo, arrays": (
        "p.pt",
        probe_of(bias=0.25, model="acme/Tiny", mask=TokenMask(exclude_last=5)),
    ),
    "head": (
        "head",
        probe_of(
            (5,),
            bias=0.25,
            site="final_norm",
            aggregation="max",
            mask=TokenMask(roles=("user",), left=2, right=3, exclude_last=1),
            threshold=-1.5,
            model="acme/Tiny",
        ),
    ),
    "head, float64": ("head", probe_of((1,), directions=(ONE,), bias=0.1)),
    "gguf": ("p.gguf", probe_of((2, 3, 7), positive_class="positive", model="llama")),
    "gguf, no hint": ("p.gguf", probe_of((2,), positive_class="positive")),
}


@pytest.mark.parametrize("kind", CARRIED)
def test_what_a_format_carries_is_read_back(tmp_path: Path, kind: str) -> None:
    name, probe = CARRIED[kind]
    written = write_probe(probe, tmp_path / name)
    again = load_probe(tmp_path / name)
    assert again.same_as(probe)
    assert again.digest == probe.digest
    assert all(path.is_file() for path in written)
    # And nothing else is there: no scratch is left.
    found = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert found == set(written)
    # From there to the project's own format and back, as it was.
    write_probe(again, tmp_path / "own.safetensors")
    for path in written:
        path.unlink()
    write_probe(load_probe(tmp_path / "own.safetensors"), tmp_path / name)
    assert load_probe(tmp_path / name).same_as(probe)


def test_apollo_s_own_reader_finds_its_keys(tmp_path: Path) -> None:
    """What the published code takes from the file, by the unpickler that it uses."""
    import torch

    probe = probe_of(mask=PUBLISHED, **scaler())
    write_probe(probe, tmp_path / "detector.pt")
    content = pickle.loads((tmp_path / "detector.pt").read_bytes())
    keys = ["layers", "directions", "scaler_mean", "scaler_scale", "normalize", "reg_coeff"]
    assert list(content) == keys
    assert (content["layers"], content["normalize"]) == ([3, 5], True)
    assert content["directions"].dtype == torch.float32
    assert content["directions"].shape == (2, HIDDEN)
    x = np.random.default_rng(0).standard_normal((4, HIDDEN))
    mean, scale, weight = (
        content[key].double().numpy() for key in ("scaler_mean", "scaler_scale", "directions")
    )
    by_hand = np.mean([((x - mean[i]) / scale[i]) @ weight[i] for i in range(2)], axis=0)
    assert np.allclose(reference_scores(probe, {3: x, 5: x}), by_hand, rtol=1e-12)


def test_a_head_as_torch_s_linear(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    probe = probe_of((5,), bias=0.25)
    write_probe(probe, tmp_path / "head")
    linear = torch.nn.Linear(HIDDEN, 1)
    linear.load_state_dict(load_file(tmp_path / "head" / "probe.safetensors"))
    x = torch.randn(4, HIDDEN)
    expected = reference_scores(probe, {5: x.double().numpy()})
    assert np.allclose(linear(x).detach().numpy()[:, 0], expected, atol=1e-5)
    assert json.loads((tmp_path / "head" / "probe_config.json").read_text())["layer_idx"] == 4


def test_a_control_vector_as_the_format_s_own_reader_sees_it(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="reads what was written with the format's package")
    probe = probe_of((2, 7), positive_class="positive", model="llama")
    write_probe(probe, tmp_path / "p.gguf")
    reader = gguf.GGUFReader(tmp_path / "p.gguf")
    assert {t.name: t.data.tolist() for t in reader.tensors} == {
        "direction.1": probe.directions[0].tolist(),
        "direction.6": probe.directions[1].tolist(),
    }
    assert {t.tensor_type for t in reader.tensors} == {gguf.GGMLQuantizationType.F32}
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "controlvector"
    assert fields["controlvector.model_hint"] == "llama"
    assert fields["controlvector.layer_count"] == 2


OWN = ".safetensors carries all"
FOLD = "--fold puts mean and scale into direction and bias, and "


@pytest.mark.parametrize(
    ("name", "probe", "text"),
    [
        (
            "p.pt",
            probe_of(mask=PUBLISHED, bias=0.25, site="final_norm", aggregation="max"),
            "an Apollo detector can't carry site final_norm and aggregation max and bias 0.25, and "
            f"would score otherwise; {OWN}",
        ),
        (
            "p.pt",
            probe_of(mask=TokenMask(left=1), **scaler()),
            f"an Apollo detector can't carry the token mask, and would score otherwise; {OWN}",
        ),
        (
            "p.pt",
            probe_of(bias=0.5, **scaler()),
            "an Apollo detector can't carry mean and scale, and would score otherwise; "
            f"{FOLD}{OWN}",
        ),
        (
            "head",
            probe_of((5,), **scaler(1)),
            f"a linear head can't carry mean and scale, and would score otherwise; {FOLD}{OWN}",
        ),
        ("head", probe_of(), "a linear head reads one layer, and the probe 2; write .safetensors"),
        (
            "head",
            probe_of((0,)),
            "a linear head reads a block's output, and the probe the embedding (layer 0); write "
            ".safetensors",
        ),
        (
            "p.gguf",
            probe_of((1, 3)),
            "a gguf control vector begins at layer 2, and the probe reads layer 1; write "
            ".safetensors",
        ),
        (
            "p.gguf",
            probe_of(bias=0.25, site="final_norm", threshold=1.0),
            "a gguf control vector can't carry site final_norm and bias 0.25, and would score "
            f"otherwise; {OWN}",
        ),
        (
            "p.gguf",
            probe_of((2,), directions=(ONE,)),
            "a gguf control vector can't carry digits of the direction, and would score otherwise; "
            f"{OWN}",
        ),
        (
            "p.gguf",
            probe_of(threshold=1.0),
            "a gguf control vector can't carry positive class deceptive and threshold 1.0; --lossy "
            "leaves that out, which changes no score, and .safetensors carries it",
        ),
        (
            "p.bin",
            probe_of(),
            "is no folder (linear head) and does not end in .safetensors, .pt (Apollo's) or .gguf; "
            "name it so",
        ),
        (
            "no/p.pt",
            probe_of(),
            "cannot be written: No such file or directory; choose another place",
        ),
    ],
)
def test_what_would_be_lost_is_refused(tmp_path: Path, name: str, probe: Probe, text: str) -> None:
    with pytest.raises(ProbeFileError) as error:
        write_probe(probe, tmp_path / name)
    assert str(error.value) == f"{tmp_path / name}: {text}"
    assert list(tmp_path.iterdir()) == []


def test_lossy_leaves_out_what_changes_no_score(tmp_path: Path) -> None:
    probe = probe_of(threshold=1.0, model="llama")
    write_probe(probe, tmp_path / "p.gguf", lossy=True)
    again = load_probe(tmp_path / "p.gguf")
    assert again.digest == probe.digest
    assert (again.threshold, again.positive_class, again.model) == (None, "positive", "llama")
    # A scaler that only tells the size enters no score either.
    sized = probe_of((22,), **{**scaler(1), "normalize": False})
    write_probe(sized, tmp_path / "head", lossy=True)
    assert load_probe(tmp_path / "head").digest == sized.digest
    # The layout that loses least is taken: the arrays carry the model.
    named = probe_of(model="acme/Tiny", threshold=1.0)
    write_probe(named, tmp_path / "p.pt", lossy=True)
    assert load_probe(tmp_path / "p.pt").model == "acme/Tiny"
    with pytest.raises(ProbeFileError, match=r"can't carry bias 0\.5, and would score otherwise"):
        write_probe(probe_of(bias=0.5), tmp_path / "q.gguf", lossy=True)


@pytest.mark.parametrize("layers", [(5,), (3, 5)])
def test_folded_probes_score_alike(tmp_path: Path, layers: tuple[int, ...]) -> None:
    probe = probe_of(layers, bias=0.3, **scaler(len(layers)))
    folded = probe.folded()
    assert (folded.normalize, folded.mean, folded.scale) == (False, None, None)
    x = {layer: np.random.default_rng(layer).standard_normal((50, HIDDEN)) for layer in layers}
    assert relative_error(reference_scores(folded, x), reference_scores(probe, x)) < 1e-12
    if len(layers) == 1:
        write_probe(folded, tmp_path / "head")
        assert load_probe(tmp_path / "head").same_as(folded)


def test_places_where_something_else_would_be_read(tmp_path: Path) -> None:
    (tmp_path / "probe_config.json").write_text('{"layer_idx": 4}')
    with pytest.raises(ProbeFileError) as error:
        write_probe(probe_of(mask=PUBLISHED), tmp_path / "p.pt")
    assert str(error.value) == (
        f"{tmp_path / 'p.pt'}: an Apollo detector beside probe_config.json would be read as a "
        "linear head; write .safetensors"
    )
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ProbeFileError) as error:
        write_probe(probe_of((5,)), tmp_path)
    assert str(error.value) == (
        f"{tmp_path}: a linear head needs a folder of its own, and this one holds other files; "
        "write .safetensors"
    )
    folder = tmp_path / "again"
    write_probe(probe_of((5,)), folder)
    write_probe(probe_of((4,)), folder)
    assert load_probe(folder).layers == (4,)


def test_a_file_that_cannot_be_read_back_is_not_written(tmp_path: Path) -> None:
    """Sizes are limited when reading, so they are when writing."""
    wide = np.random.default_rng(0).standard_normal((2, 1 << 17))
    probe = Probe(layers=(2, 3), directions=tuple(wide), model="x" * (2 << 20))
    with pytest.raises(ProbeFileError) as error:
        write_probe(probe, tmp_path / "p.safetensors")
    assert str(error.value) == (
        f"{tmp_path / 'p.safetensors'}: could not be read back: p.json: is larger than 1 MiB, too "
        "large for a probe"
    )
    assert list(tmp_path.iterdir()) == []
