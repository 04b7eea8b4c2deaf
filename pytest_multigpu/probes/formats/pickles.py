"""Reads tensors out of pickles without running anything in them.

Every global of the allow-list stands for an inert function of this module: nothing is ever
imported for a file. Opcodes and their counts are checked first, since a pickle of a few bytes
can ask for gigabytes (a memo slot, a declared shape). Imports errors; numpy inside functions.
"""

from __future__ import annotations

import functools
import io
import math
import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...errors import ProbeFileError

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_OPCODES = 20_000
"""80 layers of arrays with their scalers take about 7,000. More would let small objects add up,
and nest deeply enough to exhaust the C stack."""
MAX_ELEMENTS = 1 << 23
MAX_DIMS = 4
MAX_COPIED_BYTES = 128 << 20
"""Of all storages and byte strings one pickle unpacks: it may name the same one many times."""
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001

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

# numpy type of each torch storage; bfloat16 has none and is widened to float32.
_STORAGES = {
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
    "HalfStorage": "<f2",
    "BFloat16Storage": "bf16",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
}
_NUMPY_KINDS = ("f8", "f4", "f2", "i8", "i4")


class _RefusedError(Exception):
    """Why a pickle is not read, without the file's name."""


class _Mark:
    """Stands for a class that a pickle names; it can't be called or built."""

    def __init__(self, name: str) -> None:
        self.name = name


class _Storage:
    def __init__(self, values: NDArray[Any]) -> None:
        self.values = values


class _Dtype:
    """Stands for ``numpy.dtype``: a plain number type only."""

    def __init__(self, name: Any) -> None:
        if not isinstance(name, str) or name.lstrip("<=|") not in _NUMPY_KINDS:
            raise _RefusedError(f"holds an array of dtype {name!r}; only plain numbers are read")
        self.name = "<" + name.lstrip("<=|")

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", "=", "|", ">"):
            raise _RefusedError("holds a damaged dtype")
        self.name = (">" if state[1] == ">" else "<") + self.name[1:]


class Array:
    """Stands for ``numpy.ndarray``; filled by its state, which must match its declared shape."""

    values: NDArray[Any] | None = None

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise _RefusedError("holds a damaged array")
        _, shape, dtype, fortran, raw = state
        self.values = _array(raw, dtype, shape, "F" if fortran else "C")


def _array(raw: Any, dtype: Any, shape: Any, order: Any) -> NDArray[Any]:
    import numpy as np

    if isinstance(raw, list):
        raise _RefusedError("holds an array of objects; only plain numbers are read")
    if not isinstance(dtype, _Dtype) or not isinstance(raw, (bytes, bytearray)):
        raise _RefusedError("holds a damaged array")
    shape = _shape(shape)
    kind = np.dtype(dtype.name)
    if math.prod(shape) * kind.itemsize != len(raw):
        raise _RefusedError(f"declares an array of shape {shape}, but holds {len(raw)} bytes")
    flat: NDArray[Any] = np.frombuffer(raw, dtype=kind)
    shaped: NDArray[Any] = flat.reshape(shape, order="F" if order == "F" else "C")
    return shaped


def _shape(value: Any) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)) or len(value) > MAX_DIMS:
        raise _RefusedError(f"declares a tensor of more than {MAX_DIMS} dimensions or none")
    for size in value:
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise _RefusedError("declares a damaged shape")
    if math.prod(value) > MAX_ELEMENTS:
        raise _RefusedError(f"declares a shape of more than {MAX_ELEMENTS:,} values")
    return tuple(value)


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> NDArray[Any]:
    import numpy as np

    if not isinstance(storage, _Storage) or isinstance(offset, bool) or not isinstance(offset, int):
        raise _RefusedError("holds a damaged tensor")
    shape, strides = _shape(size), _shape(stride)
    if len(shape) != len(strides) or offset < 0:
        raise _RefusedError("holds a damaged tensor")
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if 0 in shape or last >= len(storage.values):
        raise _RefusedError(f"declares a tensor of shape {shape} beyond its storage")
    values = storage.values
    # A view, never a copy: strides of 0 make any shape out of one value.
    view: NDArray[Any] = np.lib.stride_tricks.as_strided(
        values[offset:], shape, [s * values.itemsize for s in strides], writeable=False
    )
    return view


def _reconstruct(kind: Any, *_: Any) -> Array:
    if not isinstance(kind, _Mark) or kind.name != "numpy.ndarray":
        raise _RefusedError("holds a damaged array")
    return Array()


def _scalar(dtype: Any, raw: Any = None) -> float | int:
    value = _array(raw, dtype, (), "C").item()
    if not isinstance(value, (int, float)):
        raise _RefusedError("holds a damaged number")
    return value


class _Budget:
    """What one file may still unpack."""

    def __init__(self) -> None:
        self._left = MAX_COPIED_BYTES

    def spend(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            raise _RefusedError(f"refused: it unpacks to more than {MAX_COPIED_BYTES >> 20} MiB")

    def encode(self, text: Any, encoding: Any = "") -> bytes:
        if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
            raise _RefusedError("holds damaged bytes")
        self.spend(len(text))
        return text.encode("latin-1")

    def load_from_bytes(self, data: Any) -> _Storage:
        if not isinstance(data, bytes):
            raise _RefusedError("holds a damaged storage")
        self.spend(len(data))
        storage = _legacy(data, self, nested=True)
        if not isinstance(storage, _Storage):
            raise _RefusedError("holds a damaged storage")
        return storage


def _dtype(name: Any, *_: Any) -> _Dtype:
    return _Dtype(name)


def _frombuffer(raw: Any, dtype: Any, shape: Any, order: Any, *_: Any) -> NDArray[Any]:
    return _array(raw, dtype, shape, order)


def _ordered_dict(*items: Any) -> OrderedDict[Any, Any]:
    if items:
        raise _RefusedError("holds a damaged OrderedDict")
    return OrderedDict()


ALLOWED: dict[str, Any] = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch.storage._load_from_bytes": _Budget.load_from_bytes,
    "numpy.ndarray": _Mark("numpy.ndarray"),
    "numpy.dtype": _dtype,
    "numpy.core.multiarray._reconstruct": _reconstruct,
    "numpy._core.multiarray._reconstruct": _reconstruct,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
    "numpy.core.numeric._frombuffer": _frombuffer,
    "numpy._core.numeric._frombuffer": _frombuffer,
    "_codecs.encode": _Budget.encode,
}
"""The globals a probe may name, and what stands for them here."""

_STORAGE_MARKS = {f"torch.{name}": _Mark(f"torch.{name}") for name in _STORAGES}


class _Unpickler(pickle.Unpickler):
    def __init__(
        self,
        data: bytes,
        budget: _Budget,
        storage: Callable[[Any], _Storage] | None,
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
            raise _RefusedError(f"refused: it names the global {full!r}, which no probe needs")
        if found is _Budget.load_from_bytes or found is _Budget.encode:
            return functools.partial(found, self._budget)
        return found

    def persistent_load(self, pid: Any) -> _Storage:
        if self._storage is None:
            raise _RefusedError("holds a damaged storage")
        return self._storage(pid)


def _check_opcodes(data: bytes) -> int:
    """Length of the first pickle in ``data``, once each opcode is known to be harmless."""
    for count, (opcode, arg, position) in enumerate(pickletools.genops(data), 1):
        if opcode.name not in _OPCODES:
            raise _RefusedError(f"refused: pickle opcode {opcode.name}, which no probe needs")
        if count > MAX_OPCODES:
            raise _RefusedError(f"refused: more than {MAX_OPCODES:,} pickle opcodes")
        # A memo slot far out makes the unpickler allocate all slots before it.
        if opcode.name in ("BINPUT", "LONG_BINPUT") and int(arg or 0) > MAX_OPCODES:
            raise _RefusedError(f"refused: pickle memo slot {arg:,}")
        if opcode.name == "STOP":
            return int(position or 0) + 1
    raise _RefusedError("is truncated")


def _unpickle(
    data: bytes,
    budget: _Budget,
    storage: Callable[[Any], _Storage] | None = None,
    nested: bool = False,
) -> tuple[Any, int]:
    length = _check_opcodes(data)
    return _Unpickler(data[:length], budget, storage, nested).load(), length


def _storage_type(pid: Any) -> tuple[str, str, int]:
    """``(numpy type, key, number of values)`` of torch's persistent id of a storage."""
    if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
        raise _RefusedError("holds a damaged storage")
    _, mark, key, _, count = pid[:5]
    if not isinstance(mark, _Mark) or not isinstance(key, str):
        raise _RefusedError("holds a damaged storage")
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= MAX_ELEMENTS:
        raise _RefusedError(f"declares a storage of more than {MAX_ELEMENTS:,} values")
    return _STORAGES[mark.name.removeprefix("torch.")], key, count


def _itemsize(kind: str) -> int:
    return 2 if kind == "bf16" else int(kind[-1])


def _values(raw: bytes, kind: str, count: int) -> NDArray[Any]:
    import numpy as np

    if len(raw) != count * _itemsize(kind):
        raise _RefusedError(f"declares a storage of {count:,} values, but holds {len(raw):,} bytes")
    if kind == "bf16":
        wide = np.frombuffer(raw, "<u2").astype(np.uint32) << 16
        return wide.view(np.float32)
    return np.frombuffer(raw, kind)


def _legacy(data: bytes, budget: _Budget, nested: bool = False) -> Any:
    """What ``torch.save(..., _use_new_zipfile_serialization=False)`` wrote: five pickles, then
    each storage as its count (int64) and its values."""
    import numpy as np

    heads = []
    for _ in range(3):
        value, length = _unpickle(data, budget, nested=True)
        heads.append(value)
        data = data[length:]
    if heads[0] != _LEGACY_MAGIC or heads[1] != _LEGACY_PROTOCOL:
        raise _RefusedError("holds a damaged storage")
    # The values come after the pickle that needs them, so it is read twice: first for the types.
    specs: dict[str, tuple[str, int]] = {}

    def note(pid: Any) -> _Storage:
        kind, key, count = _storage_type(pid)
        if specs.setdefault(key, (kind, count)) != (kind, count):
            raise _RefusedError("holds a damaged storage")
        return _Storage(np.zeros(0, np.float32))

    length = _check_opcodes(data)
    _Scanner(data[:length], budget, note, nested).load()
    keys, used = _unpickle(data[length:], budget, nested=True)
    if not isinstance(keys, list) or set(specs) != set(keys) or len(keys) != len(specs):
        raise _RefusedError("holds a damaged storage")
    position = length + used
    loaded: dict[str, _Storage] = {}
    for key in keys:
        kind, count = specs[key]
        end = position + 8 + count * _itemsize(kind)
        if int.from_bytes(data[position : position + 8], "little") != count:
            raise _RefusedError("is truncated, or its storage is damaged")
        loaded[key] = _Storage(_values(data[position + 8 : end], kind, count))
        position = end
    body = _Unpickler(data[:length], budget, lambda pid: loaded[pid[2]], nested)
    return body.load()


class _Scanner(_Unpickler):
    """Learns the storages of a pickle; builds no tensor."""

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name)
        return (lambda *_: None) if found is _rebuild_tensor else found


def plain(value: Any) -> Any:
    """Arrays in place of their stand-ins, in dicts, lists and tuples of any depth up to 8."""
    return _plain(value, 8)


def _plain(value: Any, depth: int) -> Any:
    if depth == 0:
        raise _RefusedError("is nested too deeply")
    if isinstance(value, Array):
        if value.values is None:
            raise _RefusedError("holds a damaged array")
        return value.values
    if isinstance(value, dict):
        return {_key(key): _plain(item, depth - 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, depth - 1) for item in value]
    return value


def _key(value: Any) -> Any:
    if isinstance(value, (str, int)):
        return value
    raise _RefusedError("has a key that is neither text nor a number")


def read_pickle(source: object, data: bytes) -> Any:
    """What a pickle, raw or of ``torch.save``'s old kind, holds: dicts, lists, numbers, text and
    numpy arrays.

    :raises ProbeFileError: refused or damaged; one line that begins with ``source``.
    """

    def read() -> Any:
        budget = _Budget()
        value, length = _unpickle(data, budget)
        if isinstance(value, int) and value == _LEGACY_MAGIC and length < len(data):
            return _legacy(data, budget)
        return value

    return guarded(source, lambda: plain(read()))


def read_torch_pickle(source: object, data: bytes, record: Callable[[str], bytes]) -> Any:
    """The same for the ``data.pkl`` of ``torch.save``'s zip; ``record(key)`` gives the bytes of a
    storage."""

    known: dict[str, tuple[str, int, _Storage]] = {}

    def storage(pid: Any) -> _Storage:
        kind, key, count = _storage_type(pid)
        if key not in known:
            known[key] = (kind, count, _Storage(_values(record(key), kind, count)))
        if known[key][:2] != (kind, count):
            raise _RefusedError("holds a damaged storage")
        return known[key][2]

    return guarded(source, lambda: plain(_unpickle(data, _Budget(), storage)[0]))


def guarded(source: object, read: Callable[[], Any]) -> Any:
    """``read()``, every failure of it as one ProbeFileError that begins with ``source``."""
    try:
        return read()
    except ProbeFileError:
        raise
    except _RefusedError as error:
        raise ProbeFileError(f"{source}: {error}; do not load it with pickle or torch") from error
    except Exception as error:  # Damaged bytes can fail anywhere in the unpickler.
        kind = type(error).__name__
        raise ProbeFileError(f"{source}: is damaged ({kind}); copy or export it again") from error
