"""Is a safetensors checkpoint complete? Read from its files alone: no torch, no GPU, no network.

Format: https://github.com/huggingface/safetensors#format: 8 bytes little-endian header length,
a JSON header, then the data; every tensor's ``data_offsets`` lie back to back and end the file.

Imports errors and records.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from ..errors import UsageError, one_line, shown
from ..files import check_regular, read_bytes, read_text
from ..records.host import CheckpointReport
from .host import hub_cache

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_MAX_HEADER = 100_000_000
"""The limit that safetensors itself sets."""
_MAX_NUMBER = 1 << 60
"""Of elements or bytes; no file is larger."""
_LFS = b"version https://git-lfs"
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
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


def find_checkpoint(
    model: str, environ: Mapping[str, str] | None = None, hub_ids: Sequence[str] = ()
) -> Path | None:
    """The folder of ``model``'s checkpoint on this machine, without asking the network.

    :param model: a folder, or a hub id, whose ``main`` snapshot is looked up in the cache.
    :param hub_ids: more ids to look up (where a preset's checkpoint lives).
    :returns: None if it is not here. A folder that is found may still be incomplete.
    :raises UsageError: ``model`` is plainly a path and there is no such folder.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UsageError(f"--gpu-model: {model} is a file; name the folder that holds config.json")
    if _is_path(model):
        raise UsageError(f"--gpu-model: no such folder: {model}")
    for hub_id in (model, *hub_ids):
        snapshot = cached_snapshot(hub_id, hub_cache(os.environ if environ is None else environ))
        if snapshot is not None:
            return snapshot
    return None


def _is_path(model: str) -> bool:
    return (
        model.startswith(("/", "./", "../", "~"))
        or model in (".", "..")
        or not (_HUB_ID.fullmatch(model))
    )


def cached_snapshot(hub_id: str, cache: Path) -> Path | None:
    """The folder of ``main`` as last downloaded into the hub's cache; None if it is not there."""
    if not _HUB_ID.fullmatch(hub_id):
        return None
    repository = cache / f"models--{hub_id.replace('/', '--')}"
    try:
        commit = read_text(repository / "refs" / "main").strip()
    except (OSError, UnicodeDecodeError):
        return None
    snapshot = repository / "snapshots" / commit
    return snapshot if commit and snapshot.is_dir() else None


def check_checkpoint(path: Path | str) -> CheckpointReport:
    """Whether every byte that the checkpoint promises is there.

    :raises UsageError: there is no such folder.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UsageError(f"--gpu-model: no such folder: {path}")
    problems = _check_config(folder)
    fetch = _fetch_again(folder)
    if (folder / SINGLE).exists() or not _exists(folder / INDEX):
        names: tuple[str, ...] = (SINGLE,)
        weight_map: dict[str, str] = {}
        if not _exists(folder / SINGLE):
            problems.append(_no_weights(folder, fetch))
            return CheckpointReport(path=str(folder), problems=tuple(map(one_line, problems)))
    else:
        try:
            weight_map = _read_index(folder / INDEX)
        except _DamagedError as error:
            problems.append(f"{folder / INDEX} {error}; {fetch}")
            return CheckpointReport(path=str(folder), problems=tuple(map(one_line, problems)))
        names = tuple(sorted(set(weight_map.values())))
    total, tensors = 0, 0
    for name in names:
        file = folder / name
        try:
            held = read_header(file)
        except _DamagedError as error:
            problems.append(f"{file} {error}; {fetch}")
            held = None
        if file.exists():
            total += file.stat().st_size
        if held is None:
            continue
        tensors += len(held)
        lacking = sorted(t for t, shard in weight_map.items() if shard == name and t not in held)
        if lacking:
            more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
            problems.append(f"{file} lacks tensor {lacking[0]}{more}, named in {INDEX}; {fetch}")
    return CheckpointReport(
        path=str(folder),
        total_bytes=total,
        files=names,
        tensors=tensors,
        problems=tuple(map(one_line, problems)),
    )


class _DamagedError(Exception):
    """What is wrong with a file, as the end of a sentence that begins with its path."""


def _exists(file: Path) -> bool:
    """There, even as a link into a cache whose target is gone."""
    return file.exists() or file.is_symlink()


def _check_config(folder: Path) -> list[str]:
    file = folder / "config.json"
    try:
        _read_json(file)
    except _DamagedError as error:
        return [f"{file} {error}; {_fetch_again(folder)}"]
    return []


def _read_json(file: Path) -> dict[str, Any]:
    try:
        text = read_bytes(file)
    except FileNotFoundError:
        raise _DamagedError("is missing") from None
    except OSError as error:
        raise _DamagedError(f"cannot be read ({error.strerror})") from None
    if text.startswith(_LFS):
        raise _DamagedError("is a Git LFS pointer, not the file itself")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _DamagedError(f"is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise _DamagedError("is not a JSON object")
    return value


def _read_index(file: Path) -> dict[str, str]:
    """Tensor name to shard name."""
    weight_map = _read_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _DamagedError("has no weight_map")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_file_name(shard):
            raise _DamagedError(f"names {shown(shard)} for {tensor}, which is no file name")
    return weight_map


def _is_file_name(name: str) -> bool:
    """One that any file system takes: not a path, no control characters, 255 bytes at most."""
    plain = name.isprintable() and name not in ("", ".", "..") and Path(name).name == name
    return plain and len(name.encode()) <= 255


def read_header(file: Path) -> dict[str, Any]:
    """The tensors of a safetensors file by name, after checking the file's size exactly.

    :raises _DamagedError: missing, truncated, padded, not safetensors or no regular file.
    """
    try:
        check_regular(file)
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            start = stream.read(8)
            if (start + stream.read(24 - 8)).startswith(_LFS):
                raise _DamagedError("is a Git LFS pointer, not the file itself")
            if len(start) < 8:
                raise _DamagedError(f"is truncated: {size} bytes")
            length = int.from_bytes(start, "little")
            if length > _MAX_HEADER:
                raise _DamagedError("is not a safetensors file: its header length is absurd")
            if 8 + length > size:
                raise _DamagedError(f"is truncated: {size:,} bytes, its header alone needs more")
            stream.seek(8)
            header = stream.read(length)
    except FileNotFoundError:
        raise _DamagedError("is missing") from None
    except OSError as error:
        raise _DamagedError(f"cannot be read ({error.strerror})") from None
    try:
        tensors = json.loads(header)
    except (ValueError, RecursionError):
        raise _DamagedError("is damaged: its header is not valid JSON") from None
    if not isinstance(tensors, dict):
        raise _DamagedError("is damaged: its header is not a JSON object")
    tensors.pop("__metadata__", None)
    expected = 8 + length + _data_bytes(tensors)
    if size < expected:
        raise _DamagedError(f"is truncated: {size:,} of {expected:,} bytes")
    if size > expected:
        raise _DamagedError(f"is padded: {size:,} bytes, {expected:,} expected")
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
            raise _DamagedError(f"is damaged: its header's entry {name} is malformed") from None
        bits = _DTYPE_BITS.get(dtype) if isinstance(dtype, str) else None
        wrong_size = numbers_valid and bits is not None and (end - begin) * 8 != prod(shape) * bits
        if not numbers_valid or begin > end or wrong_size:
            raise _DamagedError(f"is damaged: its header's entry {name} contradicts itself")
        spans.append((begin, end, name))
    at = 0
    for begin, end, name in sorted(spans):
        if begin != at:
            raise _DamagedError(f"is damaged: tensor {name} begins at {begin:,}, not at {at:,}")
        at = end
    return at


def _no_weights(folder: Path, fetch: str) -> str:
    pickles = sorted(folder.glob("pytorch_model*.bin"))
    if pickles:
        return (
            f"{folder} has no safetensors weights, only {pickles[0].name}; "
            "convert it with save_pretrained(safe_serialization=True)"
        )
    return f"{folder} has neither {SINGLE} nor {INDEX}; {fetch}"


def _fetch_again(folder: Path) -> str:
    """What to do: a command if the folder is a hub cache's snapshot."""
    parts = folder.absolute().parts
    if len(parts) >= 3 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        return f"hf download {parts[-3].removeprefix('models--').replace('--', '/')}"
    return "copy or download it again"
