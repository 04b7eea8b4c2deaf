"""What a safetensors checkpoint holds, from its headers alone: no tensor is read.

Every shard is opened, its header checked and its length compared with what the header promises,
so that a truncated or missing shard is one clear error before any GPU is touched. Imports errors
and units only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError
from ..files import check_regular, read_text
from ..units import human_size

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip

TORCH_DTYPE = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
"""Names in ``torch``. What is not here is left to the stock loader."""


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor in one file."""

    name: str
    path: str
    offset: int
    """Of its first byte from the start of the file."""
    size_bytes: int
    dtype: str
    """safetensors' spelling: ``BF16``."""
    shape: tuple[int, ...]


def checkpoint_files(folder: str | os.PathLike[str]) -> tuple[Path, ...] | None:
    """The safetensors files of a checkpoint, in the index's order; None if it has none.

    :raises CheckpointError: an index that can't be read, or that names a file that is not there.
    """
    folder = Path(folder)
    if (folder / SINGLE).is_file():  # transformers prefers the single file too
        return (folder / SINGLE,)
    index = folder / INDEX
    if not index.is_file():
        return None
    try:
        weight_map = json.loads(read_text(index))["weight_map"]
        names = list(dict.fromkeys(str(name) for name in weight_map.values()))
    except OSError as error:
        raise CheckpointError(f"{index}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index}: not a safetensors index (no weight_map); download it again"
        ) from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(names)} shards missing, first {missing[0]}; "
            "download the checkpoint again"
        )
    return tuple(folder / name for name in names)


def read_headers(paths: Iterable[str | os.PathLike[str]]) -> dict[str, StoredTensor]:
    """Every tensor of ``paths`` by name; of a name that comes twice the later file wins.

    :raises CheckpointError: a file that can't be read, is damaged or is shorter than its header
        says; the text names the file.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in paths:
        tensors.update(_read_header(os.fspath(path)))
    return tensors


def _read_header(path: str) -> dict[str, StoredTensor]:
    try:
        check_regular(Path(path))
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > _MAX_HEADER_BYTES:
                raise CheckpointError(f"{path}: not a safetensors file; download it again")
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if len(raw) < length:
        raise CheckpointError(_truncated(path, size, 8 + length))
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        tensors = {
            name: StoredTensor(
                name=name,
                path=path,
                offset=8 + length + int(entry["data_offsets"][0]),
                size_bytes=int(entry["data_offsets"][1]) - int(entry["data_offsets"][0]),
                dtype=str(entry["dtype"]),
                shape=tuple(int(n) for n in entry["shape"]),
            )
            for name, entry in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{path}: its header is damaged; download it again") from error
    end = max((tensor.offset + tensor.size_bytes for tensor in tensors.values()), default=0)
    if size < end:
        raise CheckpointError(_truncated(path, size, end))
    for tensor in tensors.values():
        _check_extent(tensor)
    return tensors


def _truncated(path: str, found: int, expected: int) -> str:
    return (
        f"{path}: truncated: {human_size(found)} ({found} bytes) of {human_size(expected)} "
        f"({expected} bytes); download it again"
    )


def _check_extent(tensor: StoredTensor) -> None:
    item = ITEM_BYTES.get(tensor.dtype)
    if item is None:
        return  # a newer dtype: left to the stock loader
    numel = 1
    for size in tensor.shape:
        numel *= size
    if tensor.size_bytes != numel * item:
        raise CheckpointError(
            f"{tensor.path}: its header is damaged: {tensor.name} of shape "
            f"{list(tensor.shape)} in {tensor.dtype} takes {numel * item} bytes, not "
            f"{tensor.size_bytes}; download it again"
        )
