"""From the text of an option to its value, or one error that names option and remedy.

Imports errors, files and records.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .errors import UsageError
from .files import check_regular, why_unread
from .records.tiers import Tier

TIER_ALIASES: Mapping[str, Tier] = {
    "cpu": "cpu",
    "4bit": "4bit",
    "nf4": "4bit",
    "8bit": "8bit",
    "int8": "8bit",
    "16bit": "16bit",
    "bf16": "16bit",
    "fp16": "16bit",
}


def tier(text: str | None) -> tuple[Any, str]:
    """Tier, or ``auto``, and dtype."""
    folded = (text or "auto").casefold()
    if folded == "auto":
        return "auto", "bfloat16"
    known = TIER_ALIASES.get(folded)
    if known is None:
        raise UsageError(
            f"--gpu-tier: unknown tier {text!r}; known: auto, cpu, 4bit, 8bit, 16bit "
            "(also nf4, int8, bf16, fp16)"
        )
    return known, "float16" if folded == "fp16" else "bfloat16"


def placement(text: str) -> str:
    """``auto``, ``balanced`` or the path of a file that exists."""
    if text in ("auto", "balanced"):
        return text
    if not holds(Path(text).is_file, text, "--gpu-placement"):
        raise UsageError(
            f"--gpu-placement: {text!r} is neither auto, balanced nor a file; "
            "give a device_map in JSON"
        )
    return text


def expanded(text: str, option: str) -> Path:
    """With ``~`` as the home folder."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UsageError(f"{option}: {text!r}: {error}; check the path") from None


def holds(check: Callable[[], bool], text: str, option: str) -> bool:
    """Of a path; one error if the system does not tell: a folder that may not be entered."""
    try:
        return check()
    except OSError as error:
        raise UsageError(f"{option}: {text!r}: {why_unread(error)}; check the path") from None


def path(text: object, option: str) -> Path | None:
    """A regular file that exists."""
    if text is None:
        return None
    found = expanded(str(text), option)
    try:
        check_regular(found)
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{option}: no file {str(found)!r}; check the path") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{option}: {str(found)!r}: {why_unread(error)}; check the path") from None
    return found


def folder(text: str | None, option: str) -> Path | None:
    """A folder that exists or can come about."""
    if text is None:
        return None
    found = expanded(text, option)
    above = (found, *found.parents)
    existing = next((one for one in above if holds(one.exists, text, option)), None)
    if existing is not None and not existing.is_dir():
        raise UsageError(f"{option}: {str(existing)!r} is a file; give a folder")
    return found


def file_or_new(text: str | None, option: str) -> Path | None:
    """A file that exists or can come about."""
    if text is None:
        return None
    found = expanded(text, option)
    if holds(found.is_dir, text, option):
        raise UsageError(f"{option}: {str(found)!r} is a folder; give a file")
    return path(text, option) if os.path.exists(found) else found


def whole(text: object, option: str, default: int) -> int:
    """A whole number from 1 on."""
    if text is None:
        return default
    number = int(_number(text, option, int, str(default)))
    if number < 1:
        raise UsageError(f"{option}: {number} is out of range; write 1 or more")
    if number > 10**9:
        raise UsageError(f"{option}: {number} is out of range; write 1000000000 at most")
    return number


def seconds(text: object, option: str, default: float) -> float:
    """Seconds, an hour at most."""
    if text is None:
        return default
    number = _number(text, option, float, "10")
    if not 0 <= number <= 3600:
        raise UsageError(f"{option}: {text} is out of range; write 0 to 3600 seconds")
    return number


def _number(text: object, option: str, convert: Callable[[str], float], like: str) -> float:
    try:
        return convert(str(text))
    except ValueError:
        raise UsageError(f"{option}: {text!r} is not a number; write it like {like}") from None
