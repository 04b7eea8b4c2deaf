"""``--gpu-simulate=SPEC``: a machine that isn't there. Imports errors, units and records."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..errors import UsageError
from ..records.machine import Gpu, Machine
from ..units import MIB, parse_size
from .catalogue import CATALOGUE, GpuType, find

MAX_GPUS = 64
_GROUP = re.compile(r"\s*(\d{1,4})\s*[xX*]\s*([^\s+,][^+,]*?)\s*", re.ASCII)
_SMALLEST = 1024 * MIB


def simulate(spec: str, catalogue: tuple[GpuType, ...] = CATALOGUE) -> Machine:
    """The idle machine that ``spec`` describes: all GPUs visible, nothing used.

    ``4xA6000``, ``2x80GiB``, ``3xH100+1x24GiB``, ``2xA100-80GB``. A size is the card's total as
    NVML would report it; the driver's reserve comes off it as on a real card.

    :raises UsageError: starts with ``--gpu-simulate: ``.
    """
    types: list[GpuType] = []
    for part in spec.split("+"):
        count, row = _group(part, spec, catalogue)
        types += [row] * count
        if len(types) > MAX_GPUS:
            raise UsageError(
                f"--gpu-simulate: {spec!r} has more than {MAX_GPUS} GPUs; simulate at most that"
            )
    return idle_machine(types, spec)


def idle_machine(types: Sequence[GpuType], spec: str) -> Machine:
    """One GPU of each type, all visible, nothing used.

    :param spec: what was asked for.
    """
    gpus = tuple(
        Gpu(
            index=index,
            cuda_index=index,
            uuid=f"SIMULATED-{index}",
            name=row.name,
            total_bytes=row.total_bytes,
            free_bytes=row.free_bytes,
            reserved_bytes=row.reserved_bytes,
            capability=row.capability,
            nvlinks=row.nvlinks,
        )
        for index, row in enumerate(types)
    )
    return Machine(gpus=gpus, visible=tuple(range(len(gpus))), simulated=spec)


def _group(part: str, spec: str, catalogue: tuple[GpuType, ...]) -> tuple[int, GpuType]:
    match = _GROUP.fullmatch(part)
    if match is None:
        raise UsageError(
            f"--gpu-simulate: {spec!r} is not a machine; write it like 4xA6000, 2x80GiB "
            "or 3xH100+1x24GiB"
        )
    count, what = int(match.group(1)), match.group(2)
    if count < 1:
        raise UsageError(f"--gpu-simulate: {spec!r} asks for 0 GPUs; write 1 or more")
    row = find(what, catalogue)
    if row is None:
        row = _sized(what, catalogue)
    return count, row


def _sized(what: str, catalogue: tuple[GpuType, ...]) -> GpuType:
    if not what[0].isdigit():
        known = ", ".join(row.key for row in catalogue)
        raise UsageError(
            f"--gpu-simulate: {what!r} is no known GPU type; known: {known}; "
            "or a size such as 80GiB"
        )
    size = parse_size(what, what="--gpu-simulate")
    if size < _SMALLEST:
        raise UsageError(f"--gpu-simulate: {what!r} is less than 1GiB; give the card's whole VRAM")
    reserved = 480 * MIB
    return GpuType(
        key=what,
        name=f"simulated {what}",
        total_bytes=size,
        reserved_bytes=reserved,
        bandwidth_gb_s=1000.0,
    )
