"""The plan of a placement: what every GPU will show in use in each phase, and whether it fits.

The numbers come from a replay of the session (:mod:`.replay`), the sentences from
:mod:`.reasons`. Imports units, records and its own part.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from ..records.machine import Machine
from ..records.plan import Architecture, DeviceMap, DevicePlan, Plan
from .costs import CPU, SPARE_SHARE, Costs, costs_for
from .device_maps import OFFLOAD, expand
from .reasons import reasons
from .replay import NEW_TOKENS, Use, kv_bytes, replay


def predict(
    architecture: Architecture,
    device_map: DeviceMap,
    machine: Machine,
    *,
    context_tokens: int,
    batch: int,
    weights: Literal["synthetic", "checkpoint"],
    placement: str,
    new_tokens: int = NEW_TOKENS,
    costs: Mapping[int, Costs] | None = None,
) -> Plan:
    """The plan for a model placed by ``device_map``: bytes per GPU, whether it fits, why not.

    :param context_tokens: tokens in the cache at the end, prompt and generated, per sequence.
    :param costs: measured constants by CUDA index, instead of the table's.
    :raises UsageError: a block that the map does not cover.
    """
    placed = expand(architecture, device_map)
    offloaded = tuple(
        block.name
        for block in architecture.blocks
        if placed[block.name] in OFFLOAD and architecture.tier != "cpu"
    )
    indices = sorted({place for place in placed.values() if isinstance(place, int)})
    visible = machine.visible_gpus
    known = {i: visible[i] for i in indices if i < len(visible)}
    prices = {
        i: (costs or {}).get(i) or costs_for(known[i].capability if i in known else None)
        for i in indices
    }
    limits = {i: known[i].free_bytes if i in known else 0 for i in indices}
    free = replay(
        architecture,
        placed,
        prices,
        context_tokens=context_tokens,
        batch=batch,
        new_tokens=new_tokens,
    )
    rooms = {i: limit - int(limit * SPARE_SHARE) for i, limit in limits.items()}
    tight = {i for i in indices if free[i].peaks.worst_bytes > rooms[i]}
    used = free
    if tight:
        # Near its limit torch gives cached memory back and asks again: that may still do.
        used = replay(
            architecture,
            placed,
            prices,
            context_tokens=context_tokens,
            batch=batch,
            new_tokens=new_tokens,
            limits=rooms,
        )
    short = {i: free[i].peaks.worst_bytes - rooms[i] for i in tight if used[i].missing_bytes}
    devices = [
        _device_plan(
            architecture,
            placed,
            index,
            free[index] if index in short else used[index],
            limits[index],
            context=context_tokens,
            batch=batch,
        )
        for index in indices
    ]
    devices += _host_plans(architecture, placed, context_tokens, batch)
    return Plan(
        architecture=architecture,
        weights=weights,
        placement=placement,
        context_tokens=context_tokens,
        batch=batch,
        fits=not short and not offloaded,
        reasons=reasons(
            devices, short, offloaded, placed, known, context=context_tokens, batch=batch
        ),
        devices=tuple(devices),
        device_map=placed,
        offloaded=offloaded,
    )


def _layers(architecture: Architecture, placed: DeviceMap, place: int | str) -> tuple[int, int]:
    here = [
        block.layer
        for block in architecture.blocks
        if block.layer is not None and placed[block.name] == place
    ]
    return (min(here), max(here)) if here else (-1, -1)


def _sums(
    architecture: Architecture, placed: DeviceMap, place: int | str, context: int, batch: int
) -> tuple[int, int]:
    here = [block for block in architecture.blocks if placed[block.name] == place]
    return (
        sum(block.weights_bytes for block in here),
        sum(kv_bytes(block, context, batch) for block in here),
    )


def _device_plan(
    architecture: Architecture,
    placed: DeviceMap,
    index: int,
    use: Use,
    limit: int,
    *,
    context: int,
    batch: int,
) -> DevicePlan:
    weights, kv = _sums(architecture, placed, index, context, batch)
    layers = _layers(architecture, placed, index)
    peak = use.peaks.worst_bytes
    workspace = use.allocated_peak_bytes - weights - kv
    fixed = min(peak - weights, use.fixed_bytes)
    activation = max(0, min(workspace, peak - weights - kv - fixed))
    return DevicePlan(
        device=f"cuda:{index}",
        layers=None if layers == (-1, -1) else layers,
        weights_bytes=weights,
        kv_bytes=kv,
        activation_bytes=activation,
        reserve_bytes=max(0, peak - weights - kv - activation),
        peak_bytes=peak,
        limit_bytes=limit,
        peaks=use.peaks,
    )


def _host_plans(
    architecture: Architecture, placed: DeviceMap, context: int, batch: int
) -> list[DevicePlan]:
    plans = []
    for place in OFFLOAD:
        if place not in placed.values():
            continue
        weights, kv = _sums(architecture, placed, place, context, batch)
        layers = _layers(architecture, placed, place)
        activation = 0
        if architecture.tier == "cpu":
            on_gpu_0 = dict.fromkeys(placed, 0)
            use = replay(architecture, on_gpu_0, {0: CPU}, context_tokens=context, batch=batch)[0]
            activation = max(0, use.allocated_peak_bytes - weights - kv)
        else:
            kv = 0  # an offloaded layer's cache stays on the GPU that runs it
        plans.append(
            DevicePlan(
                device=place,
                layers=None if layers == (-1, -1) else layers,
                weights_bytes=weights,
                kv_bytes=kv,
                activation_bytes=activation,
                reserve_bytes=0,
                peak_bytes=weights + kv + activation,
                limit_bytes=0,
            )
        )
    return plans
