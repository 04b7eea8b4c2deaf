"""The project's own format: ``NAME.safetensors`` holds the vectors, ``NAME.json`` says what they
mean.

Tensors ``direction.<layer>``, and with a scaler ``mean.<layer>`` and ``scale.<layer>``, each of
shape ``(hidden,)``. The JSON's ``index`` says how ``layers`` and the tensors' names count:
``hidden_states`` (0 is the embedding) or ``blocks`` (block i gives ``hidden_states[i + 1]``).
Imports :mod:`..probe`, errors; safetensors and numpy inside functions.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from ...errors import ProbeFileError
from ..probe import AGGREGATIONS, MAX_LAYERS, SITES, Probe
from .guard import guarded
from .jsonfile import Fields, read_object
from .masks import described, read_mask

FORMAT = "pytest-multigpu probe"
VERSION = 1
_KEYS = [
    "format",
    "version",
    "layers",
    "index",
    "hidden_size",
    "site",
    "normalize",
    "bias",
    "mask",
    "aggregation",
    "positive_class",
    "model",
    "dtype",
    "threshold",
]
_MAX_HEADER = 1 << 20


def load(path: Path, data: bytes | None = None) -> Probe:
    """:raises ProbeFileError: either file is missing, damaged, or disagrees with the other."""
    from . import MAX_JSON_BYTES, read_bounded

    data = read_bounded(path) if data is None else data
    sidecar = path.with_suffix(".json")
    if not sidecar.is_file():
        raise ProbeFileError(
            f"{path}: {sidecar.name} is missing beside it; it says which layer and site to read"
        )
    fields = Fields(sidecar, read_object(sidecar, read_bounded(sidecar, MAX_JSON_BYTES)))
    fields.known(*_KEYS)
    fields.choice("format", (FORMAT,))
    if fields.integer("version") != VERSION:
        fields.fail("version", f"{fields.integer('version')} is not {VERSION}; update the package")
    stored = fields.integers("layers")
    shift = 1 if fields.choice("index", ("hidden_states", "blocks")) == "blocks" else 0
    tensors = read_tensors(path, data)
    names = {"direction": True, "mean": False, "scale": False}
    found = {name: _family(path, tensors, name, stored, need) for name, need in names.items()}
    expected = {f"{name}.{layer}" for name in names if found[name] for layer in stored}
    for name in tensors:
        if name not in expected:
            raise ProbeFileError(f"{path}: unknown tensor {name!r:.60}; layers: {list(stored)}")
    probe = Probe(
        layers=tuple(layer + shift for layer in stored),
        directions=found["direction"] or (),
        mean=found["mean"],
        scale=found["scale"],
        normalize=fields.flag("normalize"),
        bias=fields.number("bias"),
        site=fields.choice("site", SITES),
        aggregation=fields.choice("aggregation", AGGREGATIONS),
        mask=read_mask(fields),
        model=fields.text("model", None),
        positive_class=fields.text("positive_class"),
        threshold=fields.number("threshold", None),
        dtype=fields.text("dtype"),
        source=str(path),
        format="safetensors",
    )
    if fields.integer("hidden_size") != probe.hidden_size:
        fields.fail("hidden_size", f"is not the tensors' {probe.hidden_size}")
    return probe


def files(probe: Probe, name: str) -> list[dict[str, bytes]]:
    """Tensors and JSON under ``name``, which ends in ``.safetensors``."""
    import numpy as np
    from safetensors.numpy import save

    families = {"direction": probe.directions, "mean": probe.mean, "scale": probe.scale}
    kind = stored_as(*(v for family in families.values() for v in family or ()))
    tensors = {
        # The safetensors writer takes contiguous arrays only.
        f"{family}.{layer}": np.ascontiguousarray(vector, dtype=kind)
        for family, vectors in families.items()
        for layer, vector in zip(probe.layers, vectors or (), strict=False)
    }
    content = {
        "format": FORMAT,
        "version": VERSION,
        "layers": list(probe.layers),
        "index": "hidden_states",
        "hidden_size": probe.hidden_size,
        "site": probe.site,
        "normalize": probe.normalize,
        "bias": probe.bias,
        "mask": described(probe.mask),
        "aggregation": probe.aggregation,
        "positive_class": probe.positive_class,
        "model": probe.model,
        "dtype": probe.dtype,
        "threshold": probe.threshold,
    }
    sidecar = json.dumps(content, indent=2) + "\n"
    return [{name: save(tensors), str(Path(name).with_suffix(".json")): sidecar.encode()}]


def stored_as(*vectors: Any) -> Any:
    """float32 where it keeps every value of ``vectors`` as it is, else float64."""
    import numpy as np

    exact = all(np.array_equal(v, v.astype(np.float32)) for v in vectors)
    return np.float32 if exact else np.float64


def is_safetensors(data: bytes) -> bool:
    """By a header length of at most 1 MiB and the header's brace. The length may begin with the
    byte that pickles begin with; no pickle goes on like that."""
    return data[3:8] == bytes(5) and data[8:9] == b"{"


def read_tensors(path: Path, data: bytes) -> dict[str, Any]:
    """Arrays of a safetensors file; bfloat16 is widened to float32. Its reader checks that the
    header's shapes and offsets cover the file exactly, so nothing larger is allocated."""

    def read() -> dict[str, Any]:
        import numpy as np
        import torch
        from safetensors.torch import load as load_bytes

        length = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else _MAX_HEADER + 1
        if length > min(_MAX_HEADER, len(data) - 8):
            raise ProbeFileError(f"{path}: is truncated or damaged; copy or export it again")
        tensors = load_bytes(data)
        if len(tensors) > 3 * MAX_LAYERS:
            raise ProbeFileError(f"{path}: holds {len(tensors)} tensors, too many for a probe")
        allowed = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
        for name, tensor in tensors.items():
            if tensor.dtype not in allowed:
                text = f"tensor {name!r:.60} is {tensor.dtype}, not a floating-point number"
                raise ProbeFileError(f"{path}: {text}")
        wide = {
            name: tensor.float() if tensor.dtype == torch.bfloat16 else tensor
            for name, tensor in tensors.items()
        }
        return {name: np.asarray(tensor.numpy()) for name, tensor in wide.items()}

    found = guarded(path, read)
    assert isinstance(found, dict)
    return found


def _family(
    path: Path, tensors: dict[str, Any], name: str, layers: tuple[int, ...], need: bool
) -> tuple[Any, ...] | None:
    names = [f"{name}.{layer}" for layer in layers]
    if not need and not any(item in tensors for item in names):
        return None
    for item in names:
        if item not in tensors:
            raise ProbeFileError(f"{path}: tensor {item!r} is missing; export the probe again")
    return tuple(tensors[item] for item in names)
