"""What stands for torch's and numpy's types while a pickle is read: plain numbers, nothing else.

Shapes and sizes are checked against the bytes that are there, before anything is made of them.
Imports :mod:`.guard`; numpy inside functions.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from .guard import RefusedError

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_ELEMENTS = 1 << 23
MAX_DIMS = 4

# numpy type of each torch storage; bfloat16 has none and is widened to float32.
STORAGES = {
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
    "HalfStorage": "<f2",
    "BFloat16Storage": "bf16",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
}
_NUMPY_KINDS = ("f8", "f4", "f2", "i8", "i4")


class Mark:
    """Stands for a class that a pickle names; it can't be called or built."""

    def __init__(self, name: str) -> None:
        self.name = name


class Storage:
    def __init__(self, values: NDArray[Any]) -> None:
        self.values = values


class Dtype:
    """Stands for ``numpy.dtype``: a plain number type only."""

    def __init__(self, name: Any) -> None:
        if not isinstance(name, str) or name.lstrip("<=|") not in _NUMPY_KINDS:
            raise RefusedError(f"holds an array of dtype {name!r}; only plain numbers are read")
        self.name = "<" + name.lstrip("<=|")

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", "=", "|", ">"):
            raise RefusedError("holds a damaged dtype")
        self.name = (">" if state[1] == ">" else "<") + self.name[1:]


class Array:
    """Stands for ``numpy.ndarray``; filled by its state, which must match its declared shape."""

    values: NDArray[Any] | None = None

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise RefusedError("holds a damaged array")
        _, shape, dtype, fortran, raw = state
        self.values = array(raw, dtype, shape, "F" if fortran else "C")


def array(raw: Any, dtype: Any, shape: Any, order: Any) -> NDArray[Any]:
    import numpy as np

    if isinstance(raw, list):
        raise RefusedError("holds an array of objects; only plain numbers are read")
    if not isinstance(dtype, Dtype) or not isinstance(raw, (bytes, bytearray)):
        raise RefusedError("holds a damaged array")
    shape = shape_of(shape)
    kind = np.dtype(dtype.name)
    if math.prod(shape) * kind.itemsize != len(raw):
        raise RefusedError(f"declares an array of shape {shape}, but holds {len(raw)} bytes")
    flat: NDArray[Any] = np.frombuffer(raw, dtype=kind)
    shaped: NDArray[Any] = flat.reshape(shape, order="F" if order == "F" else "C")
    return shaped


def shape_of(value: Any) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)) or len(value) > MAX_DIMS:
        raise RefusedError(f"declares a tensor of more than {MAX_DIMS} dimensions or none")
    for size in value:
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise RefusedError("declares a damaged shape")
    if math.prod(value) > MAX_ELEMENTS:
        raise RefusedError(f"declares a shape of more than {MAX_ELEMENTS:,} values")
    return tuple(value)


def rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> NDArray[Any]:
    import numpy as np

    if not isinstance(storage, Storage) or isinstance(offset, bool) or not isinstance(offset, int):
        raise RefusedError("holds a damaged tensor")
    shape, strides = shape_of(size), shape_of(stride)
    if len(shape) != len(strides) or offset < 0:
        raise RefusedError("holds a damaged tensor")
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if 0 in shape or last >= len(storage.values):
        raise RefusedError(f"declares a tensor of shape {shape} beyond its storage")
    values = storage.values
    # A view, never a copy: strides of 0 make any shape out of one value.
    view: NDArray[Any] = np.lib.stride_tricks.as_strided(
        values[offset:], shape, [s * values.itemsize for s in strides], writeable=False
    )
    return view


def reconstruct(kind: Any, *_: Any) -> Array:
    if not isinstance(kind, Mark) or kind.name != "numpy.ndarray":
        raise RefusedError("holds a damaged array")
    return Array()


def scalar(dtype: Any, raw: Any = None) -> float | int:
    value = array(raw, dtype, (), "C").item()
    if not isinstance(value, (int, float)):
        raise RefusedError("holds a damaged number")
    return value


def dtype_of(name: Any, *_: Any) -> Dtype:
    return Dtype(name)


def frombuffer(raw: Any, dtype: Any, shape: Any, order: Any, *_: Any) -> NDArray[Any]:
    return array(raw, dtype, shape, order)


def ordered_dict(*items: Any) -> OrderedDict[Any, Any]:
    if items:
        raise RefusedError("holds a damaged OrderedDict")
    return OrderedDict()


def itemsize(kind: str) -> int:
    return 2 if kind == "bf16" else int(kind[-1])


def values_of(raw: bytes, kind: str, count: int) -> NDArray[Any]:
    import numpy as np

    if len(raw) != count * itemsize(kind):
        raise RefusedError(f"declares a storage of {count:,} values, but holds {len(raw):,} bytes")
    if kind == "bf16":
        wide = np.frombuffer(raw, "<u2").astype(np.uint32) << 16
        return wide.view(np.float32)
    return np.frombuffer(raw, kind)


def plain(value: Any) -> Any:
    """Arrays in place of their stand-ins, in dicts, lists and tuples of any depth up to 8."""
    return _plain(value, 8)


def _plain(value: Any, depth: int) -> Any:
    if depth == 0:
        raise RefusedError("is nested too deeply")
    if isinstance(value, Array):
        if value.values is None:
            raise RefusedError("holds a damaged array")
        return value.values
    if isinstance(value, dict):
        return {_key(key): _plain(item, depth - 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, depth - 1) for item in value]
    return value


def _key(value: Any) -> Any:
    if isinstance(value, (str, int)):
        return value
    raise RefusedError("has a key that is neither text nor a number")
