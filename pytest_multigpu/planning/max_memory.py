"""The ``max_memory`` with which plain ``device_map="auto"`` gives a placement, if there is one.

The installed transformers' planner fills one GPU after the other up to its cap. It is run, never
imitated: what it keeps back on each GPU, and what it takes a layer's size to be, differ between
releases and tiers. On several GPUs it takes no more than an even share and a buffer on all but the
last, whatever the caps are: many placements have no such ``max_memory``.
Imports units, records and its own part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

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
    if not gpus or any(place in OFFLOAD for place in target.values()):
        return None
    size = {gpu: _bytes_on(gpu, architecture, target) for gpu in gpus}
    layer = max(block.weights_bytes for block in architecture.blocks if block.kind == "layer")
    enough = 4 * architecture.weights_bytes + GIB
    caps: dict[int, str | int] = dict.fromkeys(gpus, enough)
    for gpu in gpus[:-1]:
        wanted = _layers_up_to(gpu, architecture, target)

        def off(cap: str | int, gpu: int = gpu, wanted: int = wanted) -> int:
            """Layers too many up to this GPU; below 0: too few."""
            return _layers_up_to(gpu, architecture, planner({**caps, gpu: cap})) - wanted

        # Half a layer more than it is to hold: what the planner keeps back is not known.
        found = _cap(off, size[gpu] + layer // 2, layer, enough)
        if found is None:
            return None
        caps[gpu] = found
    last = gpus[-1]
    for gibs in _upwards(size[last], enough):
        caps[last] = f"{gibs}GiB"
        if _same(architecture, target, planner(caps)):
            return caps
    return None


def _cap(off: Callable[[str | int], int], guess: int, layer: int, enough: int) -> str | int | None:
    """A cap with which ``off`` is 0: it grows with the cap, by one about every ``layer`` bytes."""
    if off(enough) < 0:
        return None
    low, high = 0, enough
    for _ in range(TRIES):
        by = off(guess)
        if by == 0:
            # Shorter to read and to type; a cap of 0 would take the GPU away.
            round_ones = [f"{-(-guess // GIB)}GiB", f"{guess // GIB}GiB", f"{guess // MIB}MiB"]
            fitting = (cap for cap in round_ones if cap[0] != "0" and off(cap) == 0)
            return next(fitting, guess)
        if by < 0:
            low = guess
        else:
            high = guess
        guess -= by * layer
        if not low < guess < high:
            guess = (low + high) // 2
    return None


def _upwards(size: int, enough: int) -> Iterator[int]:
    """GiB from ``size`` on, in steps of a thirtieth."""
    gibs = -(-size // GIB)
    while gibs * GIB < enough:
        yield gibs
        gibs += max(1, gibs // 30)


def _bytes_on(gpu: int, architecture: Architecture, placed: DeviceMap) -> int:
    return sum(b.weights_bytes for b in architecture.blocks if placed[b.name] == gpu)


def _layers_up_to(gpu: int, architecture: Architecture, placed: DeviceMap) -> int:
    """Decoder layers on GPUs up to that one."""
    places = [device_of(b.name, placed) for b in architecture.blocks if b.kind == "layer"]
    return sum(1 for place in places if isinstance(place, int) and place <= gpu)


def _same(architecture: Architecture, target: DeviceMap, placed: Mapping[str, int | str]) -> bool:
    """Every block where the target has it, whole; a rotary embedding may be on any GPU."""
    if any(place in OFFLOAD for place in placed.values()) or split_blocks(architecture, placed):
        return False
    return all(
        device_of(block.name, placed) == target[block.name]
        for block in architecture.blocks
        if block.kind != "other"
    )
