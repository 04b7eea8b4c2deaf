"""Strict, bounded JSON objects with typed fields. Imports errors only."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from ...errors import ProbeFileError

MISSING: Any = object()


def read_object(path: Path, data: bytes) -> dict[str, Any]:
    """:raises ProbeFileError: not UTF-8, not JSON, a key twice, NaN, or not an object."""

    def constant(text: str) -> NoReturn:
        raise ValueError(f"{text} is not a number")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) != len(items):
            raise ValueError("a key is there twice")
        return found

    try:
        value = json.loads(data.decode(), parse_constant=constant, object_pairs_hook=pairs)
    except RecursionError as error:
        raise ProbeFileError(f"{path}: is nested too deeply for a probe") from error
    except ValueError as error:
        raise ProbeFileError(f"{path}: is not valid JSON: {error}; correct the file") from error
    if not isinstance(value, dict):
        raise ProbeFileError(f"{path}: is not a JSON object; correct the file")
    return value


class Fields:
    """Typed reads of one object's keys; every error names file and key."""

    def __init__(self, path: Path, values: dict[str, Any], prefix: str = "") -> None:
        self.path, self.values, self.prefix = path, values, prefix

    def known(self, *keys: str) -> None:
        """:raises ProbeFileError: a key that is not one of ``keys``."""
        for key in self.values:
            if key not in keys:
                self.fail(key, f"unknown key; known: {', '.join(keys)}")

    def fail(self, key: str, text: str) -> NoReturn:
        raise ProbeFileError(f"{self.path}: {self.prefix}{key}: {text}")

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key, default)
        if value is MISSING:
            self.fail(key, "is missing; add it")
        return value

    def text(self, key: str, default: Any = MISSING) -> Any:
        value = self._get(key, default)
        if value is not default and not isinstance(value, str):
            self.fail(key, f"{value!r:.60} is not text")
        return value

    def choice(self, key: str, allowed: tuple[str, ...], default: Any = MISSING) -> Any:
        value = self._get(key, default)
        if value not in allowed:
            self.fail(key, f"{value!r:.60} is not one of {', '.join(allowed)}")
        return value

    def flag(self, key: str, default: Any = MISSING) -> Any:
        value = self._get(key, default)
        if not isinstance(value, bool):
            self.fail(key, f"{value!r:.60} is not true or false")
        return value

    def integer(self, key: str, default: Any = MISSING) -> Any:
        value = self._get(key, default)
        if value is not default and (isinstance(value, bool) or not isinstance(value, int)):
            self.fail(key, f"{value!r:.60} is not a whole number")
        if value is not default and not 0 <= value < 1 << 31:
            self.fail(key, f"{value!r:.60} is not from 0 to {(1 << 31) - 1}")
        return value

    def number(self, key: str, default: Any = MISSING) -> Any:
        value = self._get(key, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.fail(key, f"{value!r:.60} is not a number")
        if abs(value) > 1e300 or not math.isfinite(value):
            self.fail(key, "is too large a number")
        return float(value)

    def integers(self, key: str) -> tuple[int, ...]:
        value = self._get(key, MISSING)
        if not isinstance(value, list) or len(value) > 1024:
            self.fail(key, "is not a list of whole numbers")
        return tuple(Fields(self.path, {key: item}, self.prefix).integer(key) for item in value)

    def texts(self, key: str, default: tuple[str, ...]) -> tuple[str, ...]:
        value = self.values.get(key, list(default))
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self.fail(key, "is not a list of texts")
        return tuple(value)
