"""Pickles that hold tensors: raw ones, and what ``torch.save`` makes, old and new.

Imports :mod:`.unpickling`, :mod:`.numbers` and :mod:`.guard`; numpy inside functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .guard import RefusedError, guarded
from .numbers import (
    MAX_ELEMENTS,
    STORAGES,
    Mark,
    Storage,
    itemsize,
    plain,
    rebuild_tensor,
    values_of,
)
from .unpickling import Budget, Unpickler, check_opcodes, unpickle

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


def read_pickle(source: object, data: bytes) -> Any:
    """What a pickle, raw or of ``torch.save``'s old kind, holds: dicts, lists, numbers, text and
    numpy arrays.

    :raises ProbeFileError: refused or damaged; one line that begins with ``source``.
    """

    def read() -> Any:
        budget = Budget(_nested)
        value, length = unpickle(data, budget)
        if isinstance(value, int) and value == _LEGACY_MAGIC and length < len(data):
            return _legacy(data, budget)
        return value

    return guarded(source, lambda: plain(read()))


def read_torch_pickle(source: object, data: bytes, record: Callable[[str], bytes]) -> Any:
    """The same for the ``data.pkl`` of ``torch.save``'s zip; ``record(key)`` gives the bytes of a
    storage."""

    known: dict[str, tuple[str, int, Storage]] = {}
    budget = Budget(_nested)

    def storage(pid: Any) -> Storage:
        kind, key, count = _storage_type(pid)
        if key not in known:
            # The files of a zip may lie in one another.
            budget.spend(count * itemsize(kind))
            known[key] = (kind, count, Storage(values_of(record(key), kind, count)))
        if known[key][:2] != (kind, count):
            raise RefusedError("holds a damaged storage")
        return known[key][2]

    return guarded(source, lambda: plain(unpickle(data, budget, storage)[0]))


def _storage_type(pid: Any) -> tuple[str, str, int]:
    """``(numpy type, key, number of values)`` of torch's persistent id of a storage."""
    if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
        raise RefusedError("holds a damaged storage")
    _, mark, key, _, count = pid[:5]
    if not isinstance(mark, Mark) or not isinstance(key, str):
        raise RefusedError("holds a damaged storage")
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= MAX_ELEMENTS:
        raise RefusedError(f"declares a storage of more than {MAX_ELEMENTS:,} values")
    return STORAGES[mark.name.removeprefix("torch.")], key, count


def _nested(data: bytes, budget: Budget) -> Any:
    """A storage inside a pickle, as ``torch.storage._load_from_bytes`` is given it."""
    return _legacy(data, budget, nested=True)


def _legacy(data: bytes, budget: Budget, nested: bool = False) -> Any:
    """What ``torch.save(..., _use_new_zipfile_serialization=False)`` wrote: five pickles, then
    each storage as its count (int64) and its values."""
    import numpy as np

    heads = []
    for _ in range(3):
        value, length = unpickle(data, budget, nested=True)
        heads.append(value)
        data = data[length:]
    if heads[0] != _LEGACY_MAGIC or heads[1] != _LEGACY_PROTOCOL:
        raise RefusedError("holds a damaged storage")
    # The values come after the pickle that needs them, so it is read twice: first for the types.
    specs: dict[str, tuple[str, int]] = {}

    def note(pid: Any) -> Storage:
        kind, key, count = _storage_type(pid)
        if specs.setdefault(key, (kind, count)) != (kind, count):
            raise RefusedError("holds a damaged storage")
        return Storage(np.zeros(0, np.float32))

    length = check_opcodes(data)
    _Scanner(data[:length], budget, note, nested).load()
    keys, used = unpickle(data[length:], budget, nested=True)
    if not isinstance(keys, list) or set(specs) != set(keys) or len(keys) != len(specs):
        raise RefusedError("holds a damaged storage")
    position = length + used
    loaded: dict[str, Storage] = {}
    for key in keys:
        kind, count = specs[key]
        end = position + 8 + count * itemsize(kind)
        if int.from_bytes(data[position : position + 8], "little") != count:
            raise RefusedError("is truncated, or its storage is damaged")
        loaded[key] = Storage(values_of(data[position + 8 : end], kind, count))
        position = end
    body = Unpickler(data[:length], budget, lambda pid: loaded[pid[2]], nested)
    return body.load()


class _Scanner(Unpickler):
    """Learns the storages of a pickle; builds no tensor."""

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name)
        return (lambda *_: None) if found is rebuild_tensor else found
