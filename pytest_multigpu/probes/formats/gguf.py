"""gguf control vectors: tensors ``direction.<i>``, read as the output of block i, which is
``hidden_states[i + 1]``. https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

Read here, in bounds, since the public reader trusts the counts a file declares.
Imports :mod:`..probe`, errors; numpy inside functions.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

from ...errors import ProbeFileError
from ..probe import MAX_LAYERS, Probe, TokenMask
from .guard import guarded

_MAX_KEYS = 4096
_MAX_ARRAY = 1 << 16
_MAX_TEXTS = 1 << 17
"""Of all arrays: each takes a turn of the loop."""
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_UINT32, _STRING, _ARRAY = 4, 8, 9
_ALIGNMENT = 32
_TYPES = {0: "<f4", 1: "<f2", 28: "<f8", 30: "bf16"}
"""ggml tensor types of plain floats."""


class _Reader:
    def __init__(self, path: Path, data: bytes) -> None:
        self.path, self.data, self.at = path, data, 0
        self.texts = 0

    def fail(self, text: str) -> ProbeFileError:
        return ProbeFileError(f"{self.path}: {text}; copy or export it again")

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise self.fail("is truncated or damaged")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize(code)))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise self.fail(f"has a value of unknown type {kind}")
        inner, count = self.number("I"), self.number("Q")
        if count > _MAX_ARRAY or inner == _ARRAY:
            raise self.fail("holds an array too large for a control vector")
        # No array says anything about a probe.
        if inner in _SCALARS:
            self.take(count * struct.calcsize("<" + _SCALARS[inner]))
            return None
        self.texts += count
        if self.texts > _MAX_TEXTS:
            raise self.fail("holds too many texts for a control vector")
        for _ in range(count):
            self.value(inner)
        return None


def load(path: Path, data: bytes) -> Probe:
    """:raises ProbeFileError: damaged, or not a control vector of plain floats."""
    probe = guarded(path, lambda: _load(path, data))
    assert isinstance(probe, Probe)
    return probe


def _load(path: Path, data: bytes) -> Probe:
    reader = _Reader(path, data)
    reader.take(4)
    version, tensors, keys = reader.number("I"), reader.number("Q"), reader.number("Q")
    if version not in (2, 3):
        raise reader.fail(f"is gguf version {version}, not 2 or 3")
    if tensors > MAX_LAYERS or keys > _MAX_KEYS:
        raise reader.fail(f"declares {tensors:,} tensors and {keys:,} keys, too many for a probe")
    meta: dict[str, Any] = {}
    for _ in range(keys):
        name = reader.text()
        meta[name] = reader.value(reader.number("I"))
    if meta.get("general.architecture") != "controlvector":
        kind = str(meta.get("general.architecture"))[:40]
        raise ProbeFileError(f"{path}: is a gguf of {kind}, not of controlvector")
    specs: list[dict[str, Any]] = []
    for _ in range(tensors):
        name, dims = reader.text(), reader.number("I")
        if dims > 4:
            raise reader.fail(f"tensor {name!r:.60} has {dims} dimensions")
        shape = tuple(reader.number("Q") for _ in range(dims))
        kind, offset = reader.number("I"), reader.number("Q")
        specs.append({"name": name, "shape": shape, "kind": kind, "offset": offset})
    alignment = meta.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or not 0 < alignment <= 4096:
        raise reader.fail("has a damaged alignment")
    start = -(-reader.at // alignment) * alignment
    vectors = dict(_vector(reader, start, **spec) for spec in specs)
    if len(vectors) != len(specs) or not vectors:
        raise reader.fail("holds no direction, or one layer twice")
    layers = tuple(sorted(vectors))
    hint = meta.get("controlvector.model_hint")
    return Probe(
        layers=tuple(layer + 1 for layer in layers),
        directions=tuple(vectors[layer] for layer in layers),
        mask=TokenMask(),
        model=hint if isinstance(hint, str) else None,
        positive_class="positive",
        dtype=str(vectors[layers[0]].dtype),
        source=str(path),
        format="gguf",
    )


def _vector(
    reader: _Reader, start: int, *, name: str, shape: tuple[int, ...], kind: int, offset: int
) -> tuple[int, Any]:
    import numpy as np

    prefix, _, number = name.partition(".")
    if prefix != "direction" or not number.isascii() or not number.isdigit() or len(number) > 4:
        raise reader.fail(f"tensor {name!r:.60} is not direction.<layer>")
    if kind not in _TYPES:
        raise reader.fail(f"tensor {name!r} is quantised (ggml type {kind}); export plain floats")
    item = 2 if _TYPES[kind] == "bf16" else int(_TYPES[kind][-1])
    count = math.prod(shape)
    if count == 0 or max(shape, default=0) != count:
        raise reader.fail(f"tensor {name!r} has shape {shape}, not (hidden,)")
    begin = start + offset
    if begin + count * item > len(reader.data):
        raise reader.fail(f"tensor {name!r} reaches beyond the file's end")
    raw = reader.data[begin : begin + count * item]
    if _TYPES[kind] == "bf16":
        return int(number), (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    return int(number), np.frombuffer(raw, _TYPES[kind])


def unfit(probe: Probe) -> str:
    """Why a probe can't be a control vector; empty if it can. llama.cpp takes no direction.0."""
    early = [layer for layer in probe.layers if layer < 2]
    return f"begins at layer 2, and the probe reads layer {early[0]}" if early else ""


def files(probe: Probe, name: str) -> list[dict[str, bytes]]:
    """Float32 directions, the one type that llama.cpp takes, in gguf version 3."""
    import numpy as np

    def text(value: str) -> bytes:
        data = value.encode()
        return struct.pack("<Q", len(data)) + data

    def key(name: str, kind: int, value: bytes) -> bytes:
        return text(name) + struct.pack("<I", kind) + value

    keys = [
        key("general.architecture", _STRING, text("controlvector")),
        key("controlvector.layer_count", _UINT32, struct.pack("<I", len(probe.layers))),
    ]
    if probe.model is not None:
        keys.append(key("controlvector.model_hint", _STRING, text(probe.model)))
    specs, data = b"", b""
    for layer, direction in zip(probe.layers, probe.directions, strict=True):
        data += bytes(-len(data) % _ALIGNMENT)
        specs += text(f"direction.{layer - 1}")
        specs += struct.pack("<IQIQ", 1, len(direction), 0, len(data))
        data += direction.astype(np.dtype("<f4")).tobytes()
    head = b"GGUF" + struct.pack("<IQQ", 3, len(probe.layers), len(keys)) + b"".join(keys) + specs
    return [{name: head + bytes(-len(head) % _ALIGNMENT) + data + bytes(-len(data) % _ALIGNMENT)}]
