"""Sizes: parsed strictly, shown to people in GiB, kept as ``int`` bytes. Imports only errors."""

from __future__ import annotations

import re

from .errors import UsageError

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40

_UNITS = {
    "B": 1,
    "KiB": KIB,
    "MiB": MIB,
    "GiB": GIB,
    "TiB": TIB,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}
_BY_FOLDED = {unit.casefold(): size for unit, size in _UNITS.items()}
_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,15})?)\s*([A-Za-z]*)", re.ASCII)


def parse_size(text: str, *, what: str) -> int:
    """Bytes of a size such as ``40GiB``, ``40GB``, ``512MiB``; rounded down to a whole byte.

    Units are read without regard to case: ``GiB`` is 2**30 bytes, ``GB`` 10**9.

    :param what: where the size was written (``--gpu-wait``, ``gpu(vram=)``), named in the error.
    :raises UsageError: no number, no unit, or a unit that is not known.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{what}: {text!r} is not a size; write it like 40GiB or 512MiB")
    number, unit = match.groups()
    if not unit:
        raise UsageError(f"{what}: {text!r} has no unit; write {number}GiB or {number}MiB")
    factor = _BY_FOLDED.get(unit.casefold())
    if factor is None:
        raise UsageError(f"{what}: {text!r} has an unknown unit; known: {', '.join(_UNITS)}")
    whole, _, fraction = number.partition(".")
    # Integer arithmetic: 0.1TB is 100,000,000,000 bytes, not what a float makes of it.
    return int(whole) * factor + int(fraction or "0") * factor // int(10 ** len(fraction))


def gib(size_bytes: int | float, digits: int = 1) -> str:
    """``85899345920`` as ``80.0 GiB``."""
    return f"{size_bytes / GIB:.{digits}f} GiB"


def human_size(size_bytes: int) -> str:
    """GiB from 1 GiB up, MiB below (``512.0 MiB``), bytes below 1 MiB (``37 B``)."""
    if abs(size_bytes) >= GIB:
        return gib(size_bytes)
    if abs(size_bytes) >= MIB:
        return f"{size_bytes / MIB:.1f} MiB"
    return f"{size_bytes} B"
