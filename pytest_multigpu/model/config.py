"""Which model ``--gpu-model`` means: its configuration, and its checkpoint where there is one.

Presets and folders are resolved with the standard library alone; only a hub id that is in no
cache asks the hub. May import the machine's readers of the cache, presets and errors.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from ..errors import UsageError
from ..files import read_text, why_unread
from ..machine.checkpoint import cached_snapshot
from ..machine.host import hub_cache
from ..presets import HUB_IDS, PRESETS, preset_name

OPTION = "--gpu-model"
_REMEDY = "give a preset's name or the path of a folder with a config.json"
_SINGLE_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


@dataclass(frozen=True, kw_only=True)
class ResolvedModel:
    """A model that can be described, and loaded from ``checkpoint`` if that is not None."""

    name: str
    """As the user gave it."""
    config_dict: Mapping[str, Any]
    """The contents of ``config.json``; ``model_type`` is there. ``meta.load_config`` makes a
    transformers config of it; to give it to transformers yourself, deepcopy it first."""
    checkpoint: Path | None = None
    """Folder with ``config.json`` and weights on this machine. Whether every shard is whole is
    for the loader to say; a half-downloaded model of the hub's cache counts as absent."""


def resolve_config(model: str, environ: Mapping[str, str] | None = None) -> ResolvedModel:
    """Find ``model``: a preset, a folder (or a ``config.json``), or a model on the hub.

    A preset, or a hub id that a preset stands for, never needs the hub; the checkpoint in the
    local cache is used if it is there.

    :param environ: where HF_HOME and its like are read; the process's own if None.
    :raises UsageError: nothing of that name, no usable config.json, or the hub did not answer.
    """
    environ = os.environ if environ is None else environ
    preset = preset_name(model)
    if preset is not None:
        return _resolve_preset(model, preset, environ)
    try:
        path = Path(model).expanduser()
        if path.exists():
            return _resolve_path(model, path)
    except RuntimeError as error:  # no such home folder
        raise UsageError(f"{OPTION}: {model!r}: {error}; {_REMEDY}") from None
    except OSError as error:
        raise UsageError(f"{OPTION}: {model!r}: {why_unread(error)}; {_REMEDY}") from None
    if _looks_like_path(model):
        raise UsageError(f"{OPTION}: there is no folder {model!r}; {_REMEDY}")
    snapshot = _cached_snapshot(model, environ)
    if snapshot is not None:
        return ResolvedModel(
            name=model,
            config_dict=_read_config(snapshot / "config.json"),
            checkpoint=snapshot if _has_all_weights(snapshot) else None,
        )
    return ResolvedModel(name=model, config_dict=_ask_hub(model))


def preset_config(name: str) -> ResolvedModel:
    """The preset ``name`` alone, whatever is in the hub's cache.

    :raises KeyError: no such preset.
    """
    # A deep copy: transformers rewrites the nested rope settings of a dict that it is given.
    return ResolvedModel(name=name, config_dict=copy.deepcopy(dict(PRESETS[name])))


def _resolve_preset(model: str, preset: str, environ: Mapping[str, str]) -> ResolvedModel:
    for hub_id in HUB_IDS.get(preset, ()):
        snapshot = _cached_snapshot(hub_id, environ)
        if snapshot is not None and _has_all_weights(snapshot):
            return ResolvedModel(
                name=model,
                config_dict=_read_config(snapshot / "config.json"),
                checkpoint=snapshot,
            )
    return replace(preset_config(preset), name=model)


def _resolve_path(model: str, path: Path) -> ResolvedModel:
    if path.is_file():
        return ResolvedModel(name=model, config_dict=_read_config(path))
    config_file = path / "config.json"
    if not config_file.is_file():
        raise UsageError(f"{OPTION}: the folder {model!r} has no config.json; {_REMEDY}")
    has_weights = any((path / name).is_file() for name in (*_SINGLE_WEIGHTS, *_INDEXES))
    return ResolvedModel(
        name=model,
        config_dict=_read_config(config_file),
        checkpoint=path if has_weights else None,
    )


def _looks_like_path(model: str) -> bool:
    return model.startswith(("/", ".", "~")) or model.count("/") > 1 or "\\" in model


def _read_config(path: Path) -> dict[str, Any]:
    """:raises UsageError: unreadable, not JSON, not an object, or without ``model_type``."""
    try:
        config = json.loads(read_text(path))
    except OSError as error:
        raise UsageError(f"{OPTION}: cannot read {path}: {error.strerror}; {_REMEDY}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{OPTION}: {path} is not UTF-8 text; {_REMEDY}") from error
    except json.JSONDecodeError as error:
        raise UsageError(
            f"{OPTION}: {path} is not valid JSON (line {error.lineno}, column {error.colno}: "
            f"{error.msg}); download it again or correct it"
        ) from error
    except (ValueError, RecursionError) as error:  # a number too long, brackets too deep
        raise UsageError(
            f"{OPTION}: {path} cannot be read as JSON: {error}; download it again or correct it"
        ) from error
    if not isinstance(config, dict):
        raise UsageError(f"{OPTION}: {path} is not a JSON object; {_REMEDY}")
    if not isinstance(config.get("model_type"), str):
        raise UsageError(
            f"{OPTION}: {path} has no 'model_type'; it must be a transformers model's config.json"
        )
    return cast("dict[str, Any]", config)


def _cached_snapshot(hub_id: str, environ: Mapping[str, str]) -> Path | None:
    """The folder of ``main`` as last downloaded, if it holds a config.json."""
    snapshot = cached_snapshot(hub_id, hub_cache(environ))
    return snapshot if snapshot is not None and (snapshot / "config.json").is_file() else None


def _has_all_weights(snapshot: Path) -> bool:
    """Every file that the index names is there (a download may have been broken off)."""
    if any((snapshot / name).is_file() for name in _SINGLE_WEIGHTS):
        return True
    for name in _INDEXES:
        try:
            index = json.loads(read_text(snapshot / name))
            shards = set(index["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        if shards and all((snapshot / shard).is_file() for shard in shards):
            return True
    return False


def _ask_hub(model: str) -> dict[str, Any]:
    not_found = (
        f"{OPTION}: {model!r} is neither a preset ({', '.join(PRESETS)}), a folder nor a model in "
        f"the Hugging Face cache"
    )
    if model.count("/") != 1 or not all(model.split("/")):
        # Hub ids have an owner; a mistyped preset must not cost a network timeout.
        raise UsageError(f"{not_found}; {_REMEDY}")
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(model, "config.json", etag_timeout=5)
    except Exception as error:  # the hub client raises dozens of kinds; each is one sentence here
        raise UsageError(
            f"{not_found}, and the hub did not give it ({type(error).__name__}); {_REMEDY}, or "
            f"log in with 'hf auth login' if the model is gated"
        ) from error
    return _read_config(Path(path))
