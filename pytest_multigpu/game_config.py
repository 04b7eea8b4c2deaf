"""The game's own JSON: tier, probe and model from its keys. Imports errors and presets only.

Keys read: ``backend_type``, ``detector_path``, ``provide_probe_scores``, ``use_quantized``,
``quantization_bits``, and ``model`` or ``model_name``. Every other key, ``_comment_*`` among
them, is the game's own and left alone.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UsageError, shown
from .files import read_text, why_unread

# Backends of such games that run nothing on this machine: there is nothing to check for them.
_REMOTE_BACKENDS = ("claude", "mock", "modal", "modal_probe", "openai", "openrouter")


@dataclass(frozen=True, kw_only=True)
class GameConfig:
    """What the game will do, in our terms; None where its file doesn't say."""

    tier: str | None = None
    model: str | None = None
    probe: str | None = None


def read_game_config(path: Path) -> GameConfig:
    """Read a game's JSON file.

    :raises UsageError: unreadable, malformed, or a wrong value; names file, key and remedy.
    """
    try:
        text = read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read: {why_unread(error)}") from None
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:  # also an integer of thousands of digits
        raise UsageError(f"{path}: malformed JSON: {error}") from None
    if not isinstance(data, dict):
        raise UsageError(f"{path}: must hold one JSON object, not {type(data).__name__}")
    _check_backend(path, data)
    return GameConfig(
        tier=_tier(path, data),
        model=_text(path, data, "model") or _text(path, data, "model_name"),
        probe=_probe(path, data),
    )


def _check_backend(path: Path, data: dict[str, Any]) -> None:
    backend = _text(path, data, "backend_type")
    if backend is not None and backend.casefold() in _REMOTE_BACKENDS:
        raise UsageError(
            f"{path}: backend_type: {shown(backend)} runs no model on this machine, so there is "
            'nothing to check; set it to a local backend such as "probe"'
        )


def _tier(path: Path, data: dict[str, Any]) -> str | None:
    quantised = _flag(path, data, "use_quantized")
    bits = data.get("quantization_bits")
    if bits is not None and (type(bits) is not int or bits not in (4, 8, 16)):
        raise UsageError(f"{path}: quantization_bits: {shown(bits)} is not known; write 4, 8 or 16")
    if quantised is False:
        return "16bit"
    if quantised and bits is None:
        raise UsageError(f'{path}: quantization_bits: missing; add "quantization_bits": 4 or 8')
    return None if bits is None else f"{bits}bit"


def _probe(path: Path, data: dict[str, Any]) -> str | None:
    detector = _text(path, data, "detector_path")
    if detector is None or _flag(path, data, "provide_probe_scores") is False:
        return None
    # No such user's home, or a name longer than the file system allows: no such file either.
    with contextlib.suppress(OSError, RuntimeError):
        given = Path(detector).expanduser()
        # The game resolves it from where it is started; a file beside the config is the other
        # habit.
        for candidate in (given, path.parent / given):
            if candidate.is_file():
                return str(candidate)
    raise UsageError(f"{path}: detector_path: no file {shown(detector)}; check the path")


def _text(path: Path, data: dict[str, Any], key: str) -> str | None:
    value = data.get(key)
    if value is None:
        return None
    if not isinstance(value, str) or not value:
        raise UsageError(f"{path}: {key}: {shown(value)} is not a text; write it in quotes")
    return value


def _flag(path: Path, data: dict[str, Any], key: str) -> bool | None:
    value = data.get(key)
    if value is None or isinstance(value, bool):
        return value
    raise UsageError(f"{path}: {key}: {shown(value)} is neither true nor false")
