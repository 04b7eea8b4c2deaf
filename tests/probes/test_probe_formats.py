"""Every format read and converted; float32 torch against float64 numpy for all of them."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pytest_multigpu.errors import ProbeFileError
from pytest_multigpu.probes.formats import load_probe, save_probe
from pytest_multigpu.probes.probe import AGGREGATIONS, Probe, TokenMask
from pytest_multigpu.probes.reference import (
    affine_scores,
    aggregate,
    reference_scores,
    relative_error,
)
from pytest_multigpu.probes.scoring import score_activations
from pytest_multigpu.probes.synthetic import synthetic_probe
from pytest_multigpu.records.probe import default_layer

HIDDEN = 512
FORMATS = (
    *("apollo-directions", "apollo-logistic", "apollo-arrays", "apollo-bfloat16", "apollo-saved"),
    *("native", "native-float64", "head", "head-two-rows", "gguf"),
)


def write(kind: str, folder: Path) -> Path:
    """A probe file of that kind."""
    import torch

    torch.manual_seed(1)
    rng = np.random.default_rng(1)
    path = folder / f"{kind}.pt"
    if kind.startswith("apollo"):
        dtype = torch.bfloat16 if "bfloat16" in kind else torch.float32
        content: dict[str, Any] = {
            "layers": [3, 5],
            "directions": torch.randn(2, HIDDEN).to(dtype),
        }
        if "directions" not in kind:
            content |= {
                "scaler_mean": torch.randn(2, HIDDEN).to(dtype),
                "scaler_scale": torch.rand(2, HIDDEN).to(dtype) + 0.5,
                "normalize": True,
                "reg_coeff": 1e3,
            }
        if "arrays" in kind:
            content = {
                "directions": {3: rng.standard_normal(HIDDEN), 5: rng.standard_normal(HIDDEN)},
                "intercept": np.float64(0.25),
                "model_name": "acme/Tiny",
                "exclude_last_n_tokens": 5,
            }
        if "saved" in kind:
            torch.save(content, path, _use_new_zipfile_serialization=False)
        else:
            path.write_bytes(pickle.dumps(content))
        return path
    if kind.startswith("native"):
        probe = synthetic_probe(HIDDEN, 8, layers=(2, 7), site="final_norm", aggregation="max")
        scaler: dict[str, Any] = {
            "mean": tuple(rng.standard_normal(HIDDEN).astype(np.float32) for _ in range(2)),
            "scale": tuple((rng.random(HIDDEN) + 0.5).astype(np.float32) for _ in range(2)),
        }
        if "64" in kind:
            scaler["mean"] = tuple(rng.standard_normal(HIDDEN) for _ in range(2))
        made = dataclasses.replace(probe, normalize=True, bias=0.1, threshold=2.0, **scaler)
        return save_probe(made, folder / f"{kind}.safetensors")[0]
    if kind.startswith("head"):
        inside = folder / kind
        inside.mkdir()
        rows = 2 if "two" in kind else 1
        (inside / "probe_config.json").write_text(
            json.dumps({"layer_idx": 4, "hidden_size": HIDDEN, "model_name": "acme/Tiny"})
        )
        torch.save(torch.nn.Linear(HIDDEN, rows).state_dict(), inside / "probe_head.bin")
        return inside
    gguf = pytest.importorskip("gguf", reason="writes the example with the format's own package")
    path = folder / "vector.gguf"
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    for block in (1, 2):
        writer.add_tensor(f"direction.{block}", rng.standard_normal(HIDDEN).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", FORMATS)
def test_torch_agrees_with_numpy_and_survives_conversion(kind: str, tmp_path: Path) -> None:
    import torch

    probe = load_probe(write(kind, tmp_path))
    rng = np.random.default_rng(2)
    activations = {
        layer: (rng.standard_normal((300, HIDDEN)) * 2).astype(np.float32) for layer in probe.layers
    }
    wide = {layer: x.astype(np.float64) for layer, x in activations.items()}
    scores = score_activations(probe, {k: torch.from_numpy(x) for k, x in activations.items()})
    reference = reference_scores(probe, wide)
    assert relative_error(scores, reference) <= 1e-5
    assert relative_error(affine_scores(probe, wide), reference) <= 1e-12
    for how in AGGREGATIONS:
        expected = aggregate(reference, how)
        assert abs(aggregate(scores, how) - expected) <= 1e-5 * np.sqrt(np.mean(reference**2))
    copied = load_probe(save_probe(probe, tmp_path / "copy.safetensors")[0])
    assert copied.same_as(probe)
    assert copied.dtype == probe.dtype


def test_apollo_logistic_is_the_published_score(tmp_path: Path) -> None:
    """Mean over layers of ((x - mean) / scale) . w; reg_coeff and bias do not enter."""
    path = write("apollo-logistic", tmp_path)
    content = pickle.loads(path.read_bytes())
    probe = load_probe(path)
    assert (probe.layers, probe.site, probe.bias, probe.normalize) == ((3, 5), "raw", 0.0, True)
    assert probe.mask == TokenMask(left=4, right=1)
    x = np.random.default_rng(0).standard_normal((4, HIDDEN))
    mean, scale, weight = (
        content[key].double().numpy() for key in ("scaler_mean", "scaler_scale", "directions")
    )
    by_hand = np.mean([((x - mean[i]) / scale[i]) @ weight[i] for i in range(2)], axis=0)
    assert np.allclose(reference_scores(probe, {3: x, 5: x}), by_hand, rtol=1e-12)


def test_one_apollo_layer_is_read_after_the_final_norm(tmp_path: Path) -> None:
    import torch

    path = tmp_path / "detector.pt"
    path.write_bytes(pickle.dumps({"layers": [22], "directions": torch.ones(1, 4)}))
    assert load_probe(path).site == "final_norm"


def test_what_each_format_says(tmp_path: Path) -> None:
    arrays = load_probe(write("apollo-arrays", tmp_path))
    assert (arrays.bias, arrays.model, arrays.mask.exclude_last) == (0.25, "acme/Tiny", 5)
    assert arrays.dtype == "float64"
    head = load_probe(write("head", tmp_path))
    assert (head.layers, head.site, head.format) == ((5,), "raw", "linear-head")


def test_what_a_control_vector_says(tmp_path: Path) -> None:
    vector = load_probe(write("gguf", tmp_path))
    assert (vector.layers, vector.model, vector.bias) == ((2, 3), "llama", 0.0)


def test_two_rows_are_the_log_odds(tmp_path: Path) -> None:
    import torch

    folder = write("head-two-rows", tmp_path)
    state = torch.load(folder / "probe_head.bin", weights_only=True)
    x = torch.randn(5, HIDDEN, dtype=torch.float64)
    logits = (x @ state["weight"].double().T + state["bias"].double()).log_softmax(-1)
    odds = (logits[:, 1] - logits[:, 0]).numpy()
    assert np.allclose(reference_scores(load_probe(folder), {5: x.numpy()}), odds)


def head(folder: Path, **config: Any) -> Path:
    """A linear head with other keys in its config."""
    write("head", folder)
    described = {"layer_idx": 4, **config}
    (folder / "head" / "probe_config.json").write_text(json.dumps(described))
    return folder / "head"


def test_a_head_states_its_token_mask(tmp_path: Path) -> None:
    mask = {"roles": ["user"], "left": 4, "right": 1, "exclude_last": 2}
    probe = load_probe(head(tmp_path, mask=mask, target_layer_name="LlamaDecoderLayer"))
    assert probe.mask == TokenMask(roles=("user",), left=4, right=1, exclude_last=2)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"token_mask": {"left": 4}}, "token_mask: unknown key; known: layer_idx, hidden_size, "),
        ({"mlp_hidden_dim": 64}, "mlp_hidden_dim: unknown key; known: layer_idx, hidden_size, "),
        ({"mask": "assistant"}, "mask: is not an object"),
        ({"mask": {"lefts": 4}}, "mask.lefts: unknown key; known: roles, left, right, "),
        ({"mask": {"left": -1}}, "mask.left: -1 is not from 0 to 2147483647"),
        ({"target_layer_name": 5}, "target_layer_name: 5 is not text"),
        ({"hidden_size": 5}, "hidden_size: 5 is not the weight's 512"),
    ],
)
def test_wrong_probe_config(tmp_path: Path, change: dict[str, Any], text: str) -> None:
    folder = head(tmp_path, **change)
    with pytest.raises(ProbeFileError) as error:
        load_probe(folder)
    assert str(error.value).startswith(f"{folder / 'probe_config.json'}: {text}")


def test_a_head_fitted_with_an_adapter(tmp_path: Path) -> None:
    """Published trainers put the LoRA beside the head: without it the model scores otherwise."""
    folder = head(tmp_path)
    (folder / "adapter_config.json").write_text("{}")
    for path in (folder, folder / "probe_head.bin"):
        with pytest.raises(ProbeFileError) as error:
            load_probe(path)
        assert str(error.value) == (
            f"{folder}: holds adapter_config.json: the head was fitted on a model with that "
            "adapter, which is not loaded here; merge it into the model and put the head into a "
            "folder of its own"
        )


def test_index_by_blocks(tmp_path: Path) -> None:
    path, sidecar = save_probe(synthetic_probe(8, 8, layers=(3,)), tmp_path / "p.safetensors")
    described = json.loads(sidecar.read_text())
    sidecar.write_text(json.dumps({**described, "index": "blocks"}))
    assert load_probe(path).layers == (4,)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"surprise": 1}, "surprise: unknown key; known: format, version, layers, "),
        ({"site": "middle"}, "site: 'middle' is not one of raw, final_norm"),
        ({"hidden_size": 9}, "hidden_size: is not the tensors' 8"),
        ({"version": 2}, "version: 2 is not 1; update the package"),
        ({"layers": [4]}, ""),
        ({"bias": "x"}, "bias: 'x' is not a number"),
        ({"mask": {"left": -1}}, "mask.left: -1 is not from 0 to 2147483647"),
        ({"normalize": True}, "normalize: is set, but mean and scale are missing; "),
        ({"threshold": True}, "threshold: True is not a number"),
    ],
)
def test_wrong_description(tmp_path: Path, change: dict[str, Any], text: str) -> None:
    path, sidecar = save_probe(synthetic_probe(8, 8, layers=(3,)), tmp_path / "p.safetensors")
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), **change}))
    with pytest.raises(ProbeFileError) as error:
        load_probe(path)
    named = path if change.keys() & {"normalize", "layers"} else sidecar
    assert str(error.value).startswith(f"{named}: {text}")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "is not valid JSON: Expecting property name"),
        ("[]", "is not a JSON object; correct the file"),
        ('{"bias": NaN}', "is not valid JSON: NaN is not a number; correct the file"),
        ('{"a": 1, "a": 2}', "is not valid JSON: a key is there twice; correct the file"),
        ("[" * 100_000, "is nested too deeply for a probe"),
    ],
)
def test_damaged_json(tmp_path: Path, text: str, reason: str) -> None:
    path, sidecar = save_probe(synthetic_probe(8, 8), tmp_path / "p.safetensors")
    sidecar.write_text(text)
    with pytest.raises(ProbeFileError) as error:
        load_probe(path)
    assert str(error.value).startswith(f"{sidecar}: {reason}")


def test_missing_files(tmp_path: Path) -> None:
    for path, text in (
        (tmp_path / "no.pt", "no such file; check the path"),
        (tmp_path, "holds neither probe_config.json nor probe.safetensors; name the probe's file"),
    ):
        with pytest.raises(ProbeFileError) as error:
            load_probe(path)
        assert str(error.value) == f"{path}: {text}"
    path, sidecar = save_probe(synthetic_probe(8, 8), tmp_path / "p.safetensors")
    sidecar.unlink()
    with pytest.raises(ProbeFileError) as error:
        load_probe(path)
    assert str(error.value) == (
        f"{path}: p.json is missing beside it; it says which layer and site to read"
    )


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"layers": ()}, "layers: holds 0 layers, not 1 to 1024"),
        ({"layers": (1, 1)}, "layers: [1, 1] names a layer twice"),
        ({"layers": (1, 2)}, "directions: has 1 vectors for 2 layers"),
        ({"directions": (np.ones((2, 2)),)}, "directions: of layer 1 is float64 of shape (2, 2), "),
        ({"directions": (np.zeros(4),)}, "directions: of layer 1 is zero everywhere"),
        ({"mean": (np.ones(4),)}, "mean and scale: one is given without the other"),
        ({"mean": (np.ones(3),), "scale": (np.ones(3),)}, "mean: has vectors of different lengths"),
        ({"mean": (np.ones(4),), "scale": (np.zeros(4),)}, "scale: of layer 1 is not above zero"),
        ({"bias": float("inf")}, "bias: inf is not a finite number"),
        ({"mask": TokenMask(roles=())}, "mask.roles: names no role whose texts are scored"),
    ],
)
def test_probes_that_cannot_be(fields: dict[str, Any], text: str) -> None:
    whole: dict[str, Any] = {"layers": (1,), "directions": (np.ones(4),)}
    with pytest.raises(ProbeFileError) as error:
        Probe(**{**whole, **fields})
    assert str(error.value).startswith(f"memory: {text}")


def test_a_probe_cannot_be_changed() -> None:
    given = np.ones(4)
    probe = Probe(layers=(1,), directions=(given,))
    given[0] = 5
    assert probe.directions[0][0] == 1
    with pytest.raises(ValueError, match="read-only"):
        probe.directions[0][0] = 2


def test_synthetic_depth() -> None:
    assert [default_layer(n) for n in (80, 32, 4, 1)] == [22, 9, 1, 1]
    one, again = synthetic_probe(16, 80, seed=3), synthetic_probe(16, 80, seed=3)
    assert one.same_as(again)
    assert not one.same_as(synthetic_probe(16, 80, seed=4))
    assert float(np.linalg.norm(one.directions[0])) == pytest.approx(1)


@pytest.mark.parametrize("length", [0x80, 0x180, 0xFF80])
def test_a_safetensors_header_as_long_as_a_pickle_s_first_byte(tmp_path: Path, length: int) -> None:
    """Every 32nd header is: they are padded to 8 bytes."""
    described = {"dtype": "F32", "shape": [1, 8], "data_offsets": [0, 32]}
    values = np.arange(1, 9, dtype=np.float32)
    path, sidecar = save_probe(synthetic_probe(8, 4, layers=(3,)), tmp_path / "p.safetensors")

    def write(target: Path, name: str, shape: list[int]) -> None:
        header = json.dumps({name: {**described, "shape": shape}}).encode().ljust(length)
        target.write_bytes(length.to_bytes(8, "little") + header + values.tobytes())

    write(path, "direction.3", [8])
    assert load_probe(path).directions[0].tolist() == list(range(1, 9))
    sidecar.unlink()
    write(tmp_path / "probe.safetensors", "weight", [1, 8])
    (tmp_path / "probe_config.json").write_text('{"layer_idx": 2}')
    assert load_probe(tmp_path).directions[0].tolist() == list(range(1, 9))


def test_pickles_of_every_protocol(tmp_path: Path) -> None:
    import torch

    content = {"directions": {1: np.asfortranarray(np.arange(8, dtype=">f4"))}}
    tensor = {"layers": [1], "directions": torch.arange(16.0).reshape(2, 8)[1:]}
    path = tmp_path / "p.pt"
    for protocol in (2, 3, 4, 5):
        path.write_bytes(pickle.dumps(content, protocol))
        assert load_probe(path).directions[0].tolist() == list(range(8))
        path.write_bytes(pickle.dumps(tensor, protocol))
        assert load_probe(path).directions[0].tolist() == list(range(8, 16))
    saved = io.BytesIO()
    torch.save({"weight": tensor["directions"]}, saved)
    (tmp_path / "probe_config.json").write_text('{"layer_idx": 0}')
    (tmp_path / "probe.pt").write_bytes(saved.getvalue())
    assert load_probe(tmp_path).directions[0].tolist() == list(range(8, 16))
