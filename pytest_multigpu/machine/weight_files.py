"""Is one weight file whole? Told by its header and its size; no tensor is read.

safetensors: https://github.com/huggingface/safetensors#format: 8 bytes little-endian header length,
a JSON header, then the data; every tensor's ``data_offsets`` lie back to back and end the file.
torch.save's files are ZIP archives, whose directory is at their end.

Imports :mod:`..files`.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from ..files import check_regular

_MAX_HEADER = 100_000_000
"""The limit that safetensors itself sets."""
_MAX_NUMBER = 1 << 60
"""Of elements or bytes; no file is larger."""
LFS_POINTER = b"version https://git-lfs"
_DTYPE_BITS = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}


class DamagedError(Exception):
    """What is wrong with a file, as the end of a sentence that begins with its path."""


def read_header(file: Path) -> dict[str, Any]:
    """The tensors of a safetensors file by name, after checking the file's size exactly.

    :raises DamagedError: missing, truncated, padded, not safetensors or no regular file.
    """
    try:
        check_regular(file)
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            start = stream.read(8)
            if (start + stream.read(24 - 8)).startswith(LFS_POINTER):
                raise DamagedError("is a Git LFS pointer, not the file itself")
            if len(start) < 8:
                raise DamagedError(f"is truncated: {size} bytes")
            length = int.from_bytes(start, "little")
            if length > _MAX_HEADER:
                raise DamagedError("is not a safetensors file: its header length is absurd")
            if 8 + length > size:
                raise DamagedError(f"is truncated: {size:,} bytes, its header alone needs more")
            stream.seek(8)
            header = stream.read(length)
    except FileNotFoundError:
        raise DamagedError("is missing") from None
    except OSError as error:
        raise DamagedError(f"cannot be read ({error.strerror})") from None
    try:
        tensors = json.loads(header)
    except (ValueError, RecursionError):
        raise DamagedError("is damaged: its header is not valid JSON") from None
    if not isinstance(tensors, dict):
        raise DamagedError("is damaged: its header is not a JSON object")
    tensors.pop("__metadata__", None)
    expected = 8 + length + _data_bytes(tensors)
    if size < expected:
        raise DamagedError(f"is truncated: {size:,} of {expected:,} bytes")
    if size > expected:
        raise DamagedError(f"is padded: {size:,} bytes, {expected:,} expected")
    return tensors


def _data_bytes(tensors: Mapping[str, Any]) -> int:
    """Bytes of all tensors, which must lie back to back from 0."""
    spans = []
    for name, entry in tensors.items():
        try:
            begin, end = entry["data_offsets"]
            shape, dtype = entry["shape"], entry["dtype"]
            numbers_valid = all(
                type(n) is int and 0 <= n <= _MAX_NUMBER for n in (begin, end, *shape)
            )
        except (KeyError, TypeError, ValueError):
            raise DamagedError(f"is damaged: its header's entry {name} is malformed") from None
        bits = _DTYPE_BITS.get(dtype) if isinstance(dtype, str) else None
        wrong_size = numbers_valid and bits is not None and (end - begin) * 8 != prod(shape) * bits
        if not numbers_valid or begin > end or wrong_size:
            raise DamagedError(f"is damaged: its header's entry {name} contradicts itself")
        spans.append((begin, end, name))
    at = 0
    for begin, end, name in sorted(spans):
        if begin != at:
            raise DamagedError(f"is damaged: tensor {name} begins at {begin:,}, not at {at:,}")
        at = end
    return at


def check_pickle(file: Path) -> None:
    """What can be told of a file of ``torch.save`` without opening it as a pickle.

    :raises DamagedError: missing, empty, cut short or no regular file.
    """
    try:
        check_regular(file)
        with file.open("rb") as stream:
            start = stream.read(24)
        if start.startswith(LFS_POINTER):
            raise DamagedError("is a Git LFS pointer, not the file itself")
        if not start:
            raise DamagedError("is truncated: 0 bytes")
        # Older ones are bare pickles, which end anywhere.
        if start.startswith(b"PK") and not zipfile.is_zipfile(file):
            raise DamagedError("is truncated: the directory at its end is missing")
    except FileNotFoundError:
        raise DamagedError("is missing") from None
    except OSError as error:
        raise DamagedError(f"cannot be read ({error.strerror})") from None
