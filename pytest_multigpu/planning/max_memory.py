"""The ``max_memory`` with which plain ``device_map="auto"`` gives a placement, if there is one.

The installed transformers' planner fills one GPU after the other up to its cap. It is run, never
imitated: what it keeps back on each GPU, and what it takes a layer's size to be, differ between
releases and tiers. On several GPUs it takes no more than an even share and a buffer on all but the
last, whatever the caps are: many placements have no such ``max_memory``.
Imports units, records and its own part.
"""

from __future__ import annotations

from collections.abc import Callable

from ..records.automap import Planner
from ..records.plan import Architecture, DeviceMap, MaxMemory
from ..units import GIB, MIB
from .device_maps import OFFLOAD, device_of, split_blocks

TRIES = 24
"""Of one GPU's cap; as good as bisection from the whole model down to a 2,000th of it."""


def max_memory_for_auto(
    architecture: Architecture, target: DeviceMap, planner: Planner
) -> MaxMemory | None:
    """Caps that make ``planner`` place every block as ``target`` does; None if none were found.

    GPU by GPU, the later ones without a limit meanwhile. Caps are whole GiB where that does, else
    whole MiB, else bytes, and have been given to the planner in exactly that form. They are not
    what the GPUs have free: bitsandbytes fills them to nine tenths only.

    :param target: a key for each block, on GPUs alone.
    """
    gpus = sorted({place for place in target.values() if isinstance(place, int)})
    layer = architecture.weights_bytes // architecture.layers
    enough = 4 * architecture.weights_bytes + GIB
    caps: dict[int, str | int] = dict.fromkeys(gpus, enough)
    for gpu in gpus:
        wanted = _blocks_up_to(gpu, architecture, target)

        def off(cap: str | int, gpu: int = gpu, wanted: int = wanted) -> int:
            """Blocks too many up to this GPU; below 0: too few."""
            return _blocks_up_to(gpu, architecture, planner({**caps, gpu: cap})) - wanted

        # Half a layer to spare: the next one is not taken, and a round number is near.
        found = _cap(off, _bytes_on(gpu, architecture, target) + layer // 2, layer, enough)
        if found is None:
            return None
        caps[gpu] = found
    return caps if gpus and _same(architecture, target, planner(caps)) else None


def _cap(off: Callable[[str | int], int], guess: int, layer: int, enough: int) -> str | int | None:
    """A cap with which ``off`` is 0: it grows with the cap, by one about every ``layer`` bytes."""
    if off(enough) < 0:
        return None
    low, high = 0, enough
    for _ in range(TRIES):
        by = off(guess)
        if by == 0:
            # Shorter to read and to type.
            round_ones = (f"{-(-guess // GIB)}GiB", f"{guess // GIB}GiB", f"{guess // MIB}MiB")
            return next((cap for cap in round_ones if off(cap) == 0), guess)
        if by < 0:
            low = guess
        else:
            high = guess
        guess -= by * layer
        if not low < guess < high:
            guess = (low + high) // 2
    return None


def _bytes_on(gpu: int, architecture: Architecture, placed: DeviceMap) -> int:
    return sum(b.weights_bytes for b in architecture.blocks if placed[b.name] == gpu)


def _placed(architecture: Architecture, device_map: DeviceMap) -> list[int | str | None]:
    """Where each block goes; a rotary embedding may be on any GPU, and is left out."""
    return [device_of(b.name, device_map) for b in architecture.blocks if b.kind != "other"]


def _blocks_up_to(gpu: int, architecture: Architecture, device_map: DeviceMap) -> int:
    """Blocks on that GPU and on those before it."""
    places = _placed(architecture, device_map)
    return sum(isinstance(place, int) and place <= gpu for place in places)


def _same(architecture: Architecture, target: DeviceMap, found: DeviceMap) -> bool:
    """Every block, whole, where the target has it, and nothing off the GPUs."""
    if any(place in OFFLOAD for place in found.values()) or split_blocks(architecture, found):
        return False
    return _placed(architecture, found) == _placed(architecture, target)
