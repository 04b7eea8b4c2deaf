"""Is a checkpoint complete? Read from its files alone: no torch, no GPU, no network.

Imports errors, records and :mod:`.weight_files`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import UsageError, one_line, shown
from ..files import read_bytes, read_text
from ..records.host import CheckpointReport
from .host import hub_cache
from .weight_files import LFS_POINTER, DamagedError, check_pickle, read_header

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLE_INDEX = "pytorch_model.bin.index.json"
PICKLE = "pytorch_model.bin"
_WEIGHTS = ("model*.safetensors", INDEX, "pytorch_model*.bin", PICKLE_INDEX)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


def find_checkpoint(
    model: str, environ: Mapping[str, str] | None = None, hub_ids: Sequence[str] = ()
) -> Path | None:
    """The folder of ``model``'s checkpoint on this machine, without asking the network.

    :param model: a folder, or a hub id, whose ``main`` snapshot is looked up in the cache.
    :param hub_ids: more ids to look up (where a preset's checkpoint lives).
    :returns: None if it is not here, or if ``model`` is a config.json. A folder that is found may
        be incomplete, or hold no weights where no other does.
    :raises UsageError: ``model`` is plainly a path and there is no such folder.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        return None
    if _is_path(model):
        raise UsageError(f"--gpu-model: no such folder: {model}")
    cache = hub_cache(os.environ if environ is None else environ)
    here = [one for hub_id in (model, *hub_ids) if (one := cached_snapshot(hub_id, cache))]
    return next((one for one in here if has_weights(one)), here[0] if here else None)


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

    :returns: ``found`` is False for a folder that holds no weights at all, a config alone.
    :raises UsageError: there is no such folder.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UsageError(f"--gpu-model: no such folder: {path}")
    problems = _check_config(folder)
    report = CheckpointReport(path=str(folder), fetch=_fetch_again(folder))
    try:
        if not has_weights(folder):
            report = replace(report, found=False)
        elif _exists(folder / SINGLE):
            report = _check_files(report, (SINGLE,), {}, problems)
        elif _exists(folder / INDEX):
            weight_map = _read_index(folder / INDEX)
            report = _check_files(report, sorted(set(weight_map.values())), weight_map, problems)
        elif names := _pickles(folder):
            report = _check_pickles(report, names, problems)
        else:
            problems.append(f"{folder} has neither {SINGLE} nor {INDEX}")
    except DamagedError as error:  # an index: without it nobody knows which files there should be
        problems.append(str(error))
    return replace(report, problems=tuple(map(one_line, problems)))


def has_weights(folder: Path) -> bool:
    """A weight file or an index is there, if only as a link whose target is gone."""
    return any(next(folder.glob(pattern), None) is not None for pattern in _WEIGHTS)


def _check_files(
    report: CheckpointReport,
    names: Sequence[str],
    weight_map: Mapping[str, str],
    problems: list[str],
) -> CheckpointReport:
    """safetensors files; their problems are added to ``problems``."""
    total, tensors = 0, 0
    for name in names:
        file = Path(report.path, name)
        held: dict[str, Any] | None = None
        try:
            held = read_header(file)
        except DamagedError as error:
            problems.append(f"{file} {error}")
        total += _size(file)
        if held is None:
            continue
        tensors += len(held)
        lacking = sorted(t for t, shard in weight_map.items() if shard == name and t not in held)
        if lacking:
            more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
            problems.append(f"{file} lacks tensor {lacking[0]}{more}, named in {INDEX}")
    return replace(report, files=tuple(names), total_bytes=total, tensors=tensors)


def _pickles(folder: Path) -> Sequence[str]:
    """Names of the ``torch.save`` files that there should be; none if there are no such."""
    if _exists(folder / PICKLE_INDEX) and not _exists(folder / PICKLE):
        return sorted(set(_read_index(folder / PICKLE_INDEX).values()))
    return [PICKLE] if _exists(folder / PICKLE) else []


def _check_pickles(
    report: CheckpointReport, names: Sequence[str], problems: list[str]
) -> CheckpointReport:
    for name in names:
        try:
            check_pickle(Path(report.path, name))
        except DamagedError as error:
            problems.append(f"{Path(report.path, name)} {error}")
    total = sum(_size(Path(report.path, name)) for name in names)
    return replace(report, files=tuple(names), total_bytes=total, pickled=True)


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _exists(file: Path) -> bool:
    """There, even as a link into a cache whose target is gone."""
    return file.exists() or file.is_symlink()


def _check_config(folder: Path) -> list[str]:
    file = folder / "config.json"
    try:
        _read_json(file)
    except DamagedError as error:
        return [f"{file} {error}"]
    return []


def _read_json(file: Path) -> dict[str, Any]:
    try:
        text = read_bytes(file)
    except FileNotFoundError:
        raise DamagedError("is missing") from None
    except OSError as error:
        raise DamagedError(f"cannot be read ({error.strerror})") from None
    if text.startswith(LFS_POINTER):
        raise DamagedError("is a Git LFS pointer, not the file itself")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise DamagedError("is not a JSON object")
    return value


def _read_index(file: Path) -> dict[str, str]:
    """Tensor name to shard name.

    :raises DamagedError: a whole sentence, with the path.
    """
    try:
        weight_map = _read_json(file).get("weight_map")
    except DamagedError as error:
        raise DamagedError(f"{file} {error}") from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise DamagedError(f"{file} has no weight_map")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_file_name(shard):
            raise DamagedError(f"{file} names {shown(shard)} for {tensor}, which is no file name")
    return weight_map


def _is_file_name(name: str) -> bool:
    """One that any file system takes: not a path, no control characters, 255 bytes at most."""
    plain = name.isprintable() and name not in ("", ".", "..") and Path(name).name == name
    return plain and len(name.encode()) <= 255


def _fetch_again(folder: Path) -> str:
    """What to do: a command if the folder is a hub cache's snapshot."""
    parts = folder.absolute().parts
    if len(parts) >= 3 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        return f"hf download {parts[-3].removeprefix('models--').replace('--', '/')}"
    return "copy or download it again"
