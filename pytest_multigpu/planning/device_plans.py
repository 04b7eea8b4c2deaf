"""What a plan says of each device: bytes of weights, cache and the rest, the layers, the limit.

Imports records and its own part.
"""

from __future__ import annotations

from ..records.plan import Architecture, DeviceMap, DevicePlan
from .costs import CPU
from .device_maps import OFFLOAD
from .replay import kv_bytes, replay
from .use import Use


def device_plan(
    architecture: Architecture,
    placed: DeviceMap,
    index: int,
    use: Use,
    limit: int,
    *,
    context: int,
    batch: int,
) -> DevicePlan:
    """One GPU's row.

    :param placed: a key for each block.
    :param limit: its free bytes.
    """
    weights, kv = _sums(architecture, placed, index, context, batch)
    peak = use.peaks.worst_bytes
    fixed = min(peak - weights, use.fixed_bytes)
    activation = max(0, min(use.activation_bytes, peak - weights - kv - fixed))
    return DevicePlan(
        device=f"cuda:{index}",
        layers=_layers(architecture, placed, index),
        weights_bytes=weights,
        kv_bytes=kv,
        activation_bytes=activation,
        reserve_bytes=peak - weights - kv - activation,
        peak_bytes=peak,
        limit_bytes=limit,
        peaks=use.peaks,
        parts=use.parts,
    )


def host_plans(
    architecture: Architecture, placed: DeviceMap, context: int, batch: int
) -> list[DevicePlan]:
    """Rows of ``cpu`` and ``disk``, where a block is placed there."""
    plans = []
    for place in OFFLOAD:
        if place not in placed.values():
            continue
        weights, kv = _sums(architecture, placed, place, context, batch)
        activation = 0
        if architecture.tier == "cpu":
            on_gpu_0 = dict.fromkeys(placed, 0)
            use = replay(architecture, on_gpu_0, {0: CPU}, context_tokens=context, batch=batch)[0]
            activation = use.allocated_peak_bytes - weights - kv
        else:
            kv = 0  # an offloaded layer's cache stays on the GPU that runs it
        plans.append(
            DevicePlan(
                device=place,
                layers=_layers(architecture, placed, place),
                weights_bytes=weights,
                kv_bytes=kv,
                activation_bytes=activation,
                reserve_bytes=0,
                peak_bytes=weights + kv + activation,
                limit_bytes=0,
            )
        )
    return plans


def _layers(
    architecture: Architecture, placed: DeviceMap, place: int | str
) -> tuple[int, int] | None:
    """First and last; None if it has none."""
    here = [
        block.layer
        for block in architecture.blocks
        if block.layer is not None and placed[block.name] == place
    ]
    return (min(here), max(here)) if here else None


def _sums(
    architecture: Architecture, placed: DeviceMap, place: int | str, context: int, batch: int
) -> tuple[int, int]:
    """Bytes of weights and of KV cache."""
    here = [block for block in architecture.blocks if placed[block.name] == place]
    return (
        sum(block.weights_bytes for block in here),
        sum(kv_bytes(block, context, batch) for block in here),
    )
