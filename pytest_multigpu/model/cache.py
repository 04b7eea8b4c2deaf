"""A small disk cache, so that a plan seen before needs neither torch nor transformers.

Entries are JSON files under ``$XDG_CACHE_HOME/pytest-multigpu`` (``~/.cache`` without it). What
the result depends on is in the key: the configuration, the tier, the caps and the versions of
every library that has a say. Losing the cache costs seconds, never correctness.
May import records and units; the siblings only inside functions.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..records.passes import passes_from_json
from ..records.plan import Architecture, Block, LongestContext

if TYPE_CHECKING:
    from ..records.automap import AutoMap
    from ..records.plan import MaxMemory
    from ..records.rent import RentRow

_LIBRARIES = ("pytest-multigpu", "transformers", "accelerate", "bitsandbytes", "torch")
_T = TypeVar("_T")
_RULES = (
    "architecture.py",
    "automap.py",
    "blocks.py",
    "cache.py",
    "formulas.py",
    "kv.py",
    "meta.py",
    "passes.py",
    "recording.py",
    "situations.py",
    "sizes.py",
    "../decoders.py",
    "../records/passes.py",
    "../records/plan.py",
    "../planning/max_memory.py",  # read, not imported: what automap searches with
)


def folder(environ: Mapping[str, str] | None = None) -> Path:
    """Where entries are."""
    environ = os.environ if environ is None else environ
    base = environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "pytest-multigpu"


def architecture(
    model: str, inputs: Mapping[str, object], compute: Callable[[], Architecture]
) -> Architecture:
    """``compute()``, or what it gave for the same inputs before, under the name ``model``."""
    path = _entry("architecture", inputs)
    found = _read(path, _to_architecture)
    if found is None:
        found = compute()
        _write(path, asdict(found))
    # The same configuration may come under several names.
    return Architecture(**{**_fields(found), "model": model})


def auto_map(inputs: Mapping[str, object], compute: Callable[[], AutoMap]) -> AutoMap:
    """``compute()``, or what it gave for the same inputs before."""
    path = _entry("automap", inputs)
    found = _read(path, _to_auto_map)
    if found is None:
        found = compute()
        _write(path, {**asdict(found), "device_map": dict(found.device_map)})
    return found


def max_memory(
    inputs: Mapping[str, object], compute: Callable[[], MaxMemory | None]
) -> MaxMemory | None:
    """``compute()``, or what it gave for the same inputs before; that there is none is kept too."""
    path = _entry("max-memory", inputs)
    found = _read(path, _to_max_memory)
    if found is None:
        found = (compute(),)
        _write(path, {"max_memory": None if found[0] is None else dict(found[0])})
    return found[0]


def rent(
    inputs: Mapping[str, object], compute: Callable[[], tuple[RentRow, ...]]
) -> tuple[RentRow, ...]:
    """``compute()``, or what it gave for the same inputs before; what it plans with is in the key
    too, since plans are made anew whenever they are asked for."""
    from ..records.rent import RentRow

    return _rows("rent", inputs, RentRow, compute)


def longest(
    inputs: Mapping[str, object], compute: Callable[[], tuple[LongestContext, ...]]
) -> tuple[LongestContext, ...]:
    """The same for the longest contexts."""
    return _rows("longest", inputs, LongestContext, compute)


def _rows(
    kind: str,
    inputs: Mapping[str, object],
    row: Callable[..., _T],
    compute: Callable[[], tuple[_T, ...]],
) -> tuple[_T, ...]:
    path = _entry(kind, {"planning": _code(_planning()), **inputs})
    found = _read(path, lambda entry: tuple(row(**one) for one in entry["rows"]))
    if found is None:
        found = compute()
        _write(path, {"rows": [vars(one) for one in found]})
    return found


def _planning() -> list[Path]:
    package = Path(__file__).parent.parent
    pure = sorted((package / "planning").glob("*.py"))
    return [*pure, package / "records" / "plan.py", package / "cards.py"]


def _entry(kind: str, inputs: Mapping[str, object]) -> Path:
    rules = [Path(__file__).parent / name for name in _RULES]
    key = {"versions": _versions(), "code": _code(rules), **inputs}
    text = json.dumps(key, sort_keys=True, default=_plain)
    return folder() / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()}.json"


def _plain(value: object) -> object:
    return dict(value) if isinstance(value, Mapping) else str(value)


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _code(files: Iterable[Path]) -> str:
    """A changed rule makes its old results worthless, released or not."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _read(path: Path, decode: Callable[[dict[str, Any]], _T]) -> _T | None:
    """The entry; None if it is absent or damaged."""
    try:
        return decode(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _write(path: Path, entry: Mapping[str, object]) -> None:
    """Whole or not at all; a folder that cannot be written to means no cache."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
    except OSError:
        return
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(entry, file)
        Path(temporary).replace(path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)


def _fields(record: Architecture) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__dataclass_fields__}


def _to_architecture(entry: dict[str, Any]) -> Architecture:
    blocks = tuple(Block(**block) for block in entry.pop("blocks"))
    passes = entry.pop("passes")
    unknown, refused = tuple(entry.pop("unknown")), tuple(entry.pop("refused"))
    return Architecture(
        **entry,
        blocks=blocks,
        passes=None if passes is None else passes_from_json(passes),
        unknown=unknown,
        refused=refused,
    )


def _to_auto_map(entry: dict[str, Any]) -> AutoMap:
    from ..records.automap import AutoMap

    return AutoMap(
        device_map=dict(entry["device_map"]),
        refusal=entry["refusal"],
        offloaded=tuple(entry["offloaded"]),
    )


def _to_max_memory(entry: dict[str, Any]) -> tuple[MaxMemory | None]:
    caps = entry["max_memory"]
    return (None if caps is None else {int(gpu): cap for gpu, cap in caps.items()},)
