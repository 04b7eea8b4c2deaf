"""Files that the campaign's runs are given: checkpoints, probes and tests, whole or damaged."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pickle
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.fault import NotHereError

Values = Mapping[str, str]


def checkpoint(
    folder: Path, *, shards: int = 3, hidden: int = 64, layers: int = 6, vocab: int = 512
) -> Path:
    """A bf16 Llama of the built-in model's shape, in shards with an index. Imports no torch."""
    import numpy as np

    from pytest_multigpu.presets import BUILT_IN, PRESETS

    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "vocab_size": vocab}
    config = {**PRESETS[BUILT_IN], **sizes, "torch_dtype": "bfloat16"}
    if hidden != 64:
        config |= {"intermediate_size": 2 * hidden, "head_dim": hidden // 4}
    where = folder / "checkpoint"
    where.mkdir()
    (where / "config.json").write_text(json.dumps(config))
    shapes = _shapes(config)
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    placed = {name: names[i * shards // len(shapes)] for i, name in enumerate(shapes)}
    random = np.random.default_rng(0)
    for file in names:
        header: dict[str, Any] = {}
        data = bytearray()
        for name in (name for name in shapes if placed[name] == file):
            shape = shapes[name]
            values = random.standard_normal(shape, dtype=np.float32) * 0.05
            if len(shape) == 1:
                values = np.ones(shape, dtype=np.float32)  # norms
            # The upper half of a float32 is a bfloat16.
            stored = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
            header[name] = {
                "dtype": "BF16",
                "shape": list(shape),
                "data_offsets": [len(data), len(data) + len(stored)],
            }
            data += stored
        text = json.dumps(header).encode()
        (where / file).write_bytes(len(text).to_bytes(8, "little") + text + data)
    index = {"metadata": {}, "weight_map": placed}
    (where / "model.safetensors.index.json").write_text(json.dumps(index))
    return where


def _shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inner, vocab = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    block = {
        "input_layernorm": (hidden,),
        "mlp.down_proj": (hidden, inner),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "post_attention_layernorm": (hidden,),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.v_proj": (keys, hidden),
    }
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(config["num_hidden_layers"]):
        found |= {f"model.layers.{layer}.{k}.weight": v for k, v in block.items()}
    return {**found, "model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


SHARD = "model-00002-of-00003.safetensors"
INDEX = "model.safetensors.index.json"


def damaged(change: Callable[[Path], object]) -> Callable[[Path], Values]:
    """A checkpoint with a change to its folder."""

    def prepare(folder: Path) -> Values:
        where = checkpoint(folder)
        change(where)
        return {"checkpoint": str(where)}

    return prepare


def cut(where: Path) -> None:
    file = where / SHARD
    file.write_bytes(file.read_bytes()[:-4096])


def pad(where: Path) -> None:
    with (where / SHARD).open("ab") as stream:
        stream.write(bytes(4096))


def pipe(where: Path) -> None:
    """Whoever opens it waits for somebody to write."""
    (where / SHARD).unlink()
    os.mkfifo(where / SHARD)


def pointer(where: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (where / SHARD).write_text(text)


def no_weights(where: Path) -> None:
    for file in where.iterdir():
        if file.name != "config.json":
            file.unlink()


def pickles(where: Path) -> None:
    """The same weights as torch.save writes them."""
    import torch
    from safetensors.torch import load_file

    state: dict[str, torch.Tensor] = {}
    for file in where.glob("*.safetensors"):
        state |= load_file(file)
    no_weights(where)
    torch.save(state, where / "pytorch_model.bin")


def hub_cache_without_weights(folder: Path) -> Values:
    """What ``AutoConfig`` and ``AutoTokenizer`` leave of a preset's model."""
    from pytest_multigpu.presets import HUB_IDS, PRESETS

    (hub_id,) = HUB_IDS["llama-3.2-1b"]
    repository = folder / "hub" / f"models--{hub_id.replace('/', '--')}"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_text(json.dumps(dict(PRESETS["llama-3.2-1b"])))
    return {}


def rename_in_index(where: Path) -> None:
    """The index names a file that is not there; all that are there are whole."""
    index = json.loads((where / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = "model-00004-of-00004.safetensors"
    (where / INDEX).write_text(json.dumps(index))


def lacking_tensor(where: Path) -> None:
    """The index names a tensor that its shard lacks."""
    index = json.loads((where / INDEX).read_text())
    index["weight_map"]["model.layers.9.mlp.up_proj.weight"] = SHARD
    (where / INDEX).write_text(json.dumps(index))


def other_config(where: Path) -> None:
    """The configuration is another model's: 64 hidden sizes more."""
    config = json.loads((where / "config.json").read_text())
    config |= {"hidden_size": 128, "head_dim": 32}
    (where / "config.json").write_text(json.dumps(config))


def more_layers(where: Path) -> None:
    """The configuration has a layer more than the checkpoint."""
    config = json.loads((where / "config.json").read_text())
    config["num_hidden_layers"] += 1
    (where / "config.json").write_text(json.dumps(config))


def probe(**changes: Any) -> Callable[[Path], Values]:
    """A probe of the built-in model, with other fields."""

    def prepare(folder: Path) -> Values:
        import dataclasses

        from pytest_multigpu.probes.formats import save_probe
        from pytest_multigpu.probes.synthetic import synthetic_probe

        shape = changes.get("hidden", 64), changes.get("num_layers", 6)
        made = synthetic_probe(*shape, layers=changes.get("layers"))
        fields = {k: v for k, v in changes.items() if k in ("site", "model", "normalize")}
        if "scaler" in changes:
            import numpy as np

            vectors = np.full(shape[0], changes["scaler"])
            fields |= {"mean": (vectors,), "scale": (vectors,)}
        path = folder / "probe.safetensors"
        save_probe(dataclasses.replace(made, **fields), path)
        return {"probe": str(path)}

    return prepare


def with_checkpoint(prepare: Callable[[Path], Values]) -> Callable[[Path], Values]:
    """Beside a checkpoint: of synthesised weights no size tells where a probe was fitted."""
    return lambda folder: {**prepare(folder), "checkpoint": str(checkpoint(folder))}


def nan_probe(folder: Path) -> Values:
    """One number of the stored direction is NaN."""
    values = probe(layers=(3,))(folder)
    path = Path(values["probe"])
    data = bytearray(path.read_bytes())
    data[-16:-12] = b"\x00\x00\xc0\x7f"
    path.write_bytes(bytes(data))
    return values


def cut_probe(folder: Path) -> Values:
    values = probe()(folder)
    path = Path(values["probe"])
    path.write_bytes(path.read_bytes()[:-8])
    return values


class _Runs:
    """Unpickling this runs a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def evil_probe(folder: Path) -> Values:
    path = folder / "detector.pt"
    path.write_bytes(pickle.dumps({"layers": [3], "directions": _Runs(f"touch {folder}/ran")}))
    return {"probe": str(path)}


def earlier_scores(change: Callable[[list[float]], list[float]]) -> Callable[[Path], None]:
    """``drift.json`` of an earlier run of the cpu tier, whose scores were others."""

    def prepare(folder: Path) -> None:
        (row,) = json.loads(_first_drift())["scores"]
        row |= {"values": change(row["values"]), "when": 1.0}
        where = folder / "report"
        where.mkdir()
        (where / "drift.json").write_text(json.dumps({"schema": 1, "scores": [row]}))

    return prepare


def damaged_drift(folder: Path) -> None:
    """``drift.json`` cut short."""
    where = folder / "report"
    where.mkdir()
    (where / "drift.json").write_text('{"schema": 1, "scores": [')


_SCORING = threading.Lock()


def _first_drift() -> str:
    """What a run of the cpu tier keeps; scored once, whichever run needs it first."""
    with _SCORING:
        return _scored_drift()


@functools.cache
def _scored_drift() -> str:
    from pytest_multigpu.options import CPU_MODEL, Settings
    from pytest_multigpu.report.drift import to_json
    from pytest_multigpu.session import GpuSession

    session = GpuSession(Settings(tier="cpu", model=CPU_MODEL), os.environ)
    try:
        return json.dumps(to_json([session.score_texts()]))
    finally:
        session.close()


def text(**files: str) -> Callable[[Path], None]:
    """Files by name; ``__`` is a dot."""

    def prepare(folder: Path) -> None:
        for name, content in files.items():
            (folder / name.replace("__", ".")).write_text(content)

    return prepare


def device_map(changes: Mapping[str, int | str], layers: int = 80) -> Callable[[Path], None]:
    """Everything spread over four GPUs but for ``changes``."""

    def prepare(folder: Path) -> None:
        spread: dict[str, int | str] = {"model.embed_tokens": 0, "model.norm": 3, "lm_head": 3}
        spread |= {"model.rotary_emb": 0}
        spread |= {f"model.layers.{i}": i * 4 // layers for i in range(layers)}
        (folder / "map.json").write_text(json.dumps(spread | dict(changes)))

    return prepare


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A tmpfs of 1 MiB at ``small``."""
    where = folder / "small"
    where.mkdir()
    if os.geteuid() != 0:
        raise NotHereError("mounting a small disk takes root")
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(where)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NotHereError(f"no disk can be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(where)], check=True)


def fill_disk(folder: Path) -> dict[str, str]:
    """A checkpoint that lacks a shard, on a disk without room for it."""
    where = checkpoint(folder / "small")
    (where / SHARD).unlink()
    with contextlib.suppress(OSError), (folder / "small" / "filler").open("wb", 0) as stream:
        while True:
            stream.write(bytes(4096))
    return {"checkpoint": str(where)}
