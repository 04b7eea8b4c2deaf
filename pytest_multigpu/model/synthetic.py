"""Weights that no file holds: made on the device where they belong, the same bytes on any device.

Every weight is a slice of one endless, periodic sequence that an integer hash defines, starting
where the hash of the tensor's name says. Integers, powers of two and one correctly rounded
multiplication are all the arithmetic there is, so a CPU, an H100 and an H200 make equal bits,
whatever the number of devices. A big device holds one period (67 million values) and copies
slices out of it at memory speed. Imports :mod:`.half_norms`; torch in functions.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from .half_norms import factors

PERIOD = 8 * 8_388_593
"""Values until the sequence repeats: eight times a prime, so that equally long rows of one
tensor start at different places, while slices stay aligned for vectorised copies."""

BASE_STD = 0.02
WIDENING = 0.25
"""On gates and up projections, so that their product stays below 6.0, where LLM.int8 takes a
column for an outlier. Trained models have a few such columns; at full size nearly all were, which
cost gigabytes and most of the speed that an int8 model has."""
BASE_FAN_IN = 8192
_UNIT_STD = math.sqrt(4 * (256**2 - 1) / 12)
"""Of the sum of four random bytes (Irwin-Hall: close to normal, bounded by 3.5 sigma)."""
_BLOCK = 1 << 23
"""Values hashed at once: 64 MiB for each int64 temporary."""

_SAFETENSORS_DTYPE = {
    "torch.bfloat16": "BF16",
    "torch.float16": "F16",
    "torch.float32": "F32",
    "torch.float64": "F64",
}


class SequenceTable:
    """The sequence on one device in one dtype: the first ``PERIOD`` values, kept if asked to."""

    def __init__(self, device: Any, dtype: Any, *, keep: bool) -> None:
        self._device, self._dtype = device, dtype
        self._table: Any = self._hash(0, PERIOD) if keep else None

    def fill(self, out: Any, start: int, scale: float) -> None:
        """Write ``scale`` times the values from ``start`` on into ``out`` (flat, contiguous)."""
        import torch

        done, position, total = 0, start % PERIOD, out.numel()
        while done < total:
            step = min(total - done, PERIOD - position)
            if self._table is None:
                step = min(step, _BLOCK)
                source = self._hash(position, step)
            else:
                source = self._table[position : position + step]
            if scale == 1.0:
                out[done : done + step].copy_(source)
            else:
                torch.mul(source, scale, out=out[done : done + step])
            done += step
            position = (position + step) % PERIOD

    def _hash(self, start: int, count: int) -> Any:
        import torch

        values = torch.empty(count, dtype=self._dtype, device=self._device)
        for low in range(0, count, _BLOCK):
            high = min(low + _BLOCK, count)
            x = torch.arange(start + low, start + high, dtype=torch.int64, device=self._device)
            total = _four_bytes(x)
            values[low:high] = total.sub_(510).to(torch.float32).mul_(BASE_STD / _UNIT_STD)
        return values


def _hash32(x: Any) -> Any:
    """Mix int64 values below 2**32 in place; no product leaves 63 bits, so nothing overflows."""
    for factor in (0x7FEB352D, 0x45D9F3B):
        x.bitwise_xor_(x >> 16).mul_(factor).bitwise_and_(0xFFFFFFFF)
    return x.bitwise_xor_(x >> 16)


def _four_bytes(x: Any) -> Any:
    """Sum of the four bytes of the hash of each value: 0 to 1020, mean 510."""
    x = _hash32(x)
    total = x & 0xFF
    for shift in (8, 16, 24):
        total += (x >> shift) & 0xFF
    return total


def start_of(name: str) -> int:
    """Where the tensor called ``name`` starts in the sequence; a multiple of 8."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "little") % (PERIOD // 8) * 8


def scale_of(shape: tuple[int, ...]) -> float:
    """The largest power of two that brings the spread to at most ``0.02 * sqrt(8192 / fan_in)``.

    With it a matrix maps values of size 1 to values of size 0.9 to 1.8, so attention scores, gates
    and logits vary at every width, and 80 layers stay finite. More than that would not do: where
    scores spread by 4 and more, attention takes one token of thousands, and which one hangs on
    rounding (gpt-oss-20b and gemma-2-27b, 0.6 to 0.9 logit spreads with and without the cache).
    Exact in every float dtype.
    """
    return float(2.0 ** math.floor(math.log2(BASE_FAN_IN / max(shape[-1], 1)) / 2))


def widens(name: str, shape: tuple[int, ...]) -> bool:
    """A matrix of a feed-forward part that makes its input wider: gate, up, fc1.

    Those of experts go by their names: they may be narrower than the model, and where they are one
    tensor it is stored either way round.
    """
    inside = any(part in name for part in (".mlp.", ".ffn.", ".feed_forward.", ".experts."))
    if "experts." in name:
        return inside and ("gate_proj" in name or "up_proj" in name)
    return inside and len(shape) == 2 and shape[0] > shape[1]


def head_row_scales(rows: int, dtype: Any, device: Any) -> Any:
    """``(rows, 1)`` factors with a Pareto tail (alpha 4) for the output head.

    Among 128,256 equally scaled rows the two best logits are so close that 16-bit rounding makes
    them equal in one case of ten; with a heavy tail the winner is clear and still depends on the
    text. Computed on the host with correctly rounded operations only.
    """
    import torch

    hashed = _hash32(torch.arange(PERIOD, PERIOD + rows, dtype=torch.int64))
    uniform = (hashed >> 8).to(torch.float64).add_(0.5).div_(2**24)
    return uniform.sqrt_().sqrt_().reciprocal_().to(dtype).view(rows, 1).to(device)


class SyntheticTensor:
    """A tensor made when it is asked for, as a safetensors slice is read when asked for."""

    def __init__(self, make: Callable[[], Any], shape: tuple[int, ...], dtype: Any) -> None:
        self._make, self._shape, self._dtype = make, shape, dtype

    def get_shape(self) -> list[int]:
        return list(self._shape)

    def get_dtype(self) -> str:
        """In safetensors' spelling: ``BF16``."""
        return _SAFETENSORS_DTYPE.get(str(self._dtype), str(self._dtype))

    def __getitem__(self, key: Any) -> Any:
        return self._make()[key]


class SyntheticWeights:
    """Makes the tensors of one model, each on its planned device. A context manager: leaving it
    frees the tables.

    :param devices: tensor name to ``torch.device``.
    :param head: name of the output head's weight, if it has weights of its own.
    :param zeros: vectors that are 0: biases, and norms that add one to their weight.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        dtypes: Mapping[str, Any],
        devices: Mapping[str, Any],
        head: str | None = None,
        zeros: Collection[str] = (),
    ) -> None:
        self._shapes, self._dtypes, self._devices, self._head = shapes, dtypes, devices, head
        self._zeros = zeros
        self._factors = factors(shapes, zeros)
        numel: dict[Any, int] = {}
        for name, shape in shapes.items():
            key = (devices[name], dtypes[name])
            numel[key] = numel.get(key, 0) + math.prod(shape)
        # A table pays from twice its length on; a tiny model hashes just what it needs.
        self._tables = {
            (device, dtype): SequenceTable(device, dtype, keep=count > 2 * PERIOD)
            for (device, dtype), count in numel.items()
            if dtype.is_floating_point
        }

    def __enter__(self) -> SyntheticWeights:
        return self

    def __exit__(self, *_: object) -> None:
        self._tables.clear()

    def make(self, name: str, out: Any = None) -> Any:
        """The tensor called ``name`` on its device; into ``out`` if that is given."""
        import torch

        shape, dtype, device = self._shapes[name], self._dtypes[name], self._devices[name]
        if out is None:
            out = torch.empty(shape, dtype=dtype, device=device)
        if name.endswith("bias") or name in self._zeros or not dtype.is_floating_point:
            return out.zero_()  # counters and masks too
        factor = self._factors.get(name, 1.0)
        if len(shape) < 2:  # norms, mostly
            return out.fill_(factor)
        scale = scale_of(shape) * (WIDENING if widens(name, shape) else 1.0) * factor
        self._tables[device, dtype].fill(out.view(-1), start_of(name), scale)
        if name == self._head:
            out.mul_(head_row_scales(shape[0], dtype, device))
        return out
