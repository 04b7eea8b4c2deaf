"""An unpickler that runs nothing of what a file names.

Every global of the allow-list stands for an inert function of :mod:`.numbers`: nothing is ever
imported for a file. Opcodes and their counts are checked first, since a pickle of a few bytes can
ask for gigabytes (a memo slot, a declared shape). Imports :mod:`.guard` and :mod:`.numbers`.
"""

from __future__ import annotations

import functools
import io
import pickle
import pickletools
from collections.abc import Callable
from typing import Any

from .guard import RefusedError
from .numbers import (
    STORAGES,
    Mark,
    Storage,
    dtype_of,
    frombuffer,
    ordered_dict,
    rebuild_tensor,
    reconstruct,
    scalar,
)

MAX_OPCODES = 20_000
"""80 layers of arrays with their scalers take about 7,000. More would let small objects add up,
and nest deeply enough to exhaust the C stack."""
MAX_COPIED_BYTES = 128 << 20
"""Of all storages and byte strings one pickle unpacks: it may name the same one many times."""

_OPCODES = frozenset(
    [
        "PROTO",
        "FRAME",
        "STOP",
        "MARK",
        "POP",
        "EMPTY_DICT",
        "EMPTY_LIST",
        "EMPTY_TUPLE",
        "TUPLE",
        "TUPLE1",
        "TUPLE2",
        "TUPLE3",
        "LIST",
        "DICT",
        "BINUNICODE",
        "SHORT_BINUNICODE",
        "BINBYTES",
        "SHORT_BINBYTES",
        "BINBYTES8",
        "BYTEARRAY8",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG1",
        "NONE",
        "NEWTRUE",
        "NEWFALSE",
        "BINFLOAT",
        "SETITEM",
        "SETITEMS",
        "APPEND",
        "APPENDS",
        "GLOBAL",
        "STACK_GLOBAL",
        "REDUCE",
        "BUILD",
        "MEMOIZE",
        "BINGET",
        "LONG_BINGET",
        "BINPUT",
        "LONG_BINPUT",
        "BINPERSID",
    ]
)


class Budget:
    """What one file may still unpack.

    :param read_storage: reads the tensor that ``torch.save`` put into a string of bytes.
    """

    def __init__(self, read_storage: Callable[[bytes, Budget], Any]) -> None:
        self._read_storage = read_storage
        self._left = MAX_COPIED_BYTES

    def spend(self, size: int) -> None:
        """:raises RefusedError: more than one file may."""
        self._left -= size
        if self._left < 0:
            raise RefusedError(f"refused: it unpacks to more than {MAX_COPIED_BYTES >> 20} MiB")

    def encode(self, text: Any, encoding: Any = "") -> bytes:
        if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
            raise RefusedError("holds damaged bytes")
        self.spend(len(text))
        return text.encode("latin-1")

    def load_from_bytes(self, data: Any) -> Storage:
        if not isinstance(data, bytes):
            raise RefusedError("holds a damaged storage")
        self.spend(len(data))
        storage = self._read_storage(data, self)
        if not isinstance(storage, Storage):
            raise RefusedError("holds a damaged storage")
        return storage


ALLOWED: dict[str, Any] = {
    "collections.OrderedDict": ordered_dict,
    "torch._utils._rebuild_tensor_v2": rebuild_tensor,
    "torch.storage._load_from_bytes": Budget.load_from_bytes,
    "numpy.ndarray": Mark("numpy.ndarray"),
    "numpy.dtype": dtype_of,
    "numpy.core.multiarray._reconstruct": reconstruct,
    "numpy._core.multiarray._reconstruct": reconstruct,
    "numpy.core.multiarray.scalar": scalar,
    "numpy._core.multiarray.scalar": scalar,
    "numpy.core.numeric._frombuffer": frombuffer,
    "numpy._core.numeric._frombuffer": frombuffer,
    "_codecs.encode": Budget.encode,
}
"""The globals a probe may name, and what stands for them here."""

_STORAGE_MARKS = {f"torch.{name}": Mark(f"torch.{name}") for name in STORAGES}


class Unpickler(pickle.Unpickler):
    """Knows the globals of :data:`ALLOWED` and, where it is given ``storage``, torch's storage
    types; ``nested`` ones know only those."""

    def __init__(
        self,
        data: bytes,
        budget: Budget,
        storage: Callable[[Any], Storage] | None,
        nested: bool = False,
    ) -> None:
        super().__init__(io.BytesIO(data))
        self._budget = budget
        self._storage = storage
        self._nested = nested

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        # A storage inside a probe holds numbers: it names storage types and nothing else.
        found = None if self._nested else ALLOWED.get(full)
        if found is None and self._storage is not None:
            found = _STORAGE_MARKS.get(full)
        if found is None:
            raise RefusedError(f"refused: it names the global {full!r}, which no probe needs")
        if found is Budget.load_from_bytes or found is Budget.encode:
            return functools.partial(found, self._budget)
        return found

    def persistent_load(self, pid: Any) -> Storage:
        if self._storage is None:
            raise RefusedError("holds a damaged storage")
        return self._storage(pid)


def check_opcodes(data: bytes) -> int:
    """Length of the first pickle in ``data``, once each opcode is known to be harmless."""
    for count, (opcode, arg, position) in enumerate(pickletools.genops(data), 1):
        if opcode.name not in _OPCODES:
            raise RefusedError(f"refused: pickle opcode {opcode.name}, which no probe needs")
        if count > MAX_OPCODES:
            raise RefusedError(f"refused: more than {MAX_OPCODES:,} pickle opcodes")
        # A memo slot far out makes the unpickler allocate all slots before it.
        if opcode.name in ("BINPUT", "LONG_BINPUT") and int(arg or 0) > MAX_OPCODES:
            raise RefusedError(f"refused: pickle memo slot {arg:,}")
        if opcode.name == "STOP":
            return int(position or 0) + 1
    raise RefusedError("is truncated")


def unpickle(
    data: bytes,
    budget: Budget,
    storage: Callable[[Any], Storage] | None = None,
    nested: bool = False,
) -> tuple[Any, int]:
    """The first pickle in ``data``, and its length.

    :param storage: gives the storage that torch's persistent id names.
    :raises RefusedError: it asks for more than a probe does.
    """
    length = check_opcodes(data)
    return Unpickler(data[:length], budget, storage, nested).load(), length
