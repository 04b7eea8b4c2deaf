"""Why a plan does not fit, in sentences. Imports units, records and its own part."""

from __future__ import annotations

from collections.abc import Mapping

from ..records.machine import Gpu
from ..records.plan import DeviceMap, DevicePlan
from ..units import MIB, gib
from .device_maps import OFFLOAD

NOTABLE = 64 * MIB
"""Memory in use by others from here on is named in the reason."""


def reasons(
    devices: list[DevicePlan],
    short: Mapping[int, int],
    offloaded: tuple[str, ...],
    placed: DeviceMap,
    cards: Mapping[int, Gpu],
    *,
    context: int,
    batch: int,
) -> tuple[str, ...]:
    """A sentence for each GPU that is short, the worst first, and one for each kind of offload.

    :param short: bytes lacking, what is kept spare included, by CUDA index.
    :param cards: the GPUs that are there, by CUDA index.
    """
    found = []
    by_index = {device.device: device for device in devices}
    for index, missing in sorted(short.items(), key=lambda item: (-item[1], item[0])):
        device = by_index[f"cuda:{index}"]
        if index not in cards:
            found.append(f"GPU {index} is not there: CUDA sees {len(cards)} of the map's GPUs")
            continue
        taken = cards[index].used_bytes
        spare = device.limit_bytes - device.peak_bytes
        if spare < 0:
            lacks, kept = -spare, ""
        else:
            lacks, kept = (
                missing,
                f", too close to the last byte ({gib(missing + spare)} are kept spare)",
            )
        found.append(
            f"GPU {index} lacks {gib(lacks)}: it would peak at {gib(device.peak_bytes)} of "
            f"{gib(device.limit_bytes)} free{kept} with {context} tokens x {batch}"
            + (f"; {gib(taken)} are in use already" if taken >= NOTABLE else "")
        )
    for place in OFFLOAD:
        names = [name for name in offloaded if placed[name] == place]
        if names:
            where = "the CPU" if place == "cpu" else "disk"
            listed = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if names[4:] else "")
            found.append(f"{len(names)} {_blocks(len(names))} would go to {where}: {listed}")
    return tuple(found)


def _blocks(count: int) -> str:
    return "block" if count == 1 else "blocks"
