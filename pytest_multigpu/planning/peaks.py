"""What every GPU will show in use, in each phase, before anything loads.

Loading, prefill, decode and probing are replayed on a simulated caching allocator for each GPU
(:mod:`.allocator`, :mod:`.forward`, :mod:`.load`); to that comes what the process holds outside
the allocator (:mod:`.costs`). Imports units, records and its own part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ..records.machine import Gpu as GpuRow
from ..records.machine import Machine
from ..records.plan import Architecture, Block, DeviceMap, DevicePlan, Peaks, Plan
from ..units import MIB, gib
from .allocator import Allocator, DeviceFullError
from .costs import CPU, SPARE_SHARE, Costs, costs_for
from .device_maps import OFFLOAD, expand
from .forward import Forward, Gpu
from .load import load

NEW_TOKENS = 16
"""Of the context, how many are generated one by one; the rest is the prompt."""

NOTABLE = 64 * MIB
"""Memory in use by others from here on is named in the reason."""


@dataclass(frozen=True, kw_only=True)
class Use:
    """One GPU after a replay. Bytes; ``peaks`` as NVML shows them."""

    peaks: Peaks
    allocated_peak_bytes: int
    """In tensors, at the worst moment after loading."""
    fixed_bytes: int
    """Outside torch's allocator, plus the cuBLAS workspace."""
    missing_bytes: int = 0
    """With a limit: what the driver lacked when it ran out; 0 if it did not."""


def kv_bytes(block: Block, context_tokens: int, batch: int) -> int:
    """KV cache of one block: sliding-window layers keep ``kv_window`` tokens at most."""
    tokens = context_tokens
    if block.kv_window is not None:
        tokens = min(tokens, block.kv_window)
    return block.kv_bytes_per_token * tokens * batch


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
        reasons=_reasons(
            devices, short, offloaded, placed, known, context=context_tokens, batch=batch
        ),
        devices=tuple(devices),
        device_map=placed,
        offloaded=offloaded,
    )


def replay(
    architecture: Architecture,
    placed: Mapping[str, int | str],
    costs: Mapping[int, Costs],
    *,
    context_tokens: int,
    batch: int,
    new_tokens: int = NEW_TOKENS,
    limits: Mapping[int, int] | None = None,
    probe: bool = True,
) -> dict[int, Use]:
    """What each GPU holds in each phase. Blocks on cpu or disk run on the first GPU meanwhile.

    Prefill and the decode steps after it start from the loaded model; so does the probe, a pass
    over the same tokens without cache and head.

    Under ``limits`` a GPU that runs out reports ``missing_bytes`` and the replay goes on without
    a limit on it, so that one call finds every GPU that is short.
    """
    missing: dict[int, int] = {}
    rooms: dict[int, int | None] = dict.fromkeys(
        {place for place in placed.values() if isinstance(place, int)}
    )
    if limits is not None:
        rooms = {i: max(0, limits[i] - _outside(costs[i])) for i in rooms}

    def loaded() -> tuple[dict[int, Gpu], list[tuple[Block, Gpu]]]:
        gpus = {
            index: Gpu(allocator=_Forgiving(rooms[index], index, missing), costs=costs[index])
            for index in sorted(rooms)
        }
        first = next(iter(gpus.values()))
        blocks = []
        for block in architecture.blocks:
            place = placed[block.name]
            blocks.append((block, gpus[place] if isinstance(place, int) else first))
        for gpu in gpus.values():
            here = [b for b, at in blocks if at is gpu and placed[b.name] not in OFFLOAD]
            load(gpu, architecture, here)
        return gpus, blocks

    if not rooms:
        return {}
    forward = Forward(architecture, logits_rows=1)
    new_tokens = max(1, min(new_tokens, context_tokens - 1))
    prompt = max(1, context_tokens - new_tokens)
    gpus, blocks = loaded()
    peaks = {"load": _reserved(gpus), "probe": dict.fromkeys(gpus, 0)}
    for gpu in gpus.values():
        gpu.allocator.restart_peaks()
        gpu.allocator.take(gpu.costs.workspace_bytes)
    forward.run(blocks, tokens=prompt, batch=batch, total_tokens=prompt)
    peaks["prefill"] = _reserved(gpus)
    for step in range(prompt + 1, context_tokens + 1):
        if step == prompt + 1:
            forward.run(blocks, tokens=1, batch=batch, total_tokens=step)
        else:
            forward.extend(blocks, batch=batch, total_tokens=step)
    peaks["decode"] = _reserved(gpus)
    if probe:
        probed, blocks = loaded()
        for gpu in probed.values():
            gpu.allocator.restart_peaks()
            gpu.allocator.take(gpu.costs.workspace_bytes)
        forward.run(blocks, tokens=prompt, batch=batch, total_tokens=prompt, probe=True)
        peaks["probe"] = _reserved(probed)
    return {
        index: Use(
            peaks=Peaks(
                load_bytes=peaks["load"][index] + gpu.costs.context_bytes,
                prefill_bytes=peaks["prefill"][index] + _outside(gpu.costs),
                decode_bytes=peaks["decode"][index] + _outside(gpu.costs),
                probe_bytes=peaks["probe"][index] + _outside(gpu.costs) if probe else 0,
            ),
            allocated_peak_bytes=gpu.allocator.peak_allocated,
            fixed_bytes=_outside(gpu.costs) + gpu.costs.workspace_bytes,
            missing_bytes=missing.get(index, 0),
        )
        for index, gpu in gpus.items()
    }


class _Forgiving(Allocator):
    """Notes what was missing when it first ran out, and goes on without a limit."""

    def __init__(self, limit_bytes: int | None, index: int, missing: dict[int, int]) -> None:
        super().__init__(limit_bytes)
        self._index, self._missing = index, missing

    def _segment(self, size: int, small: bool):  # type: ignore[no-untyped-def]  # noqa: ANN202
        try:
            return super()._segment(size, small)
        except DeviceFullError as error:
            self._missing[self._index] = error.missing_bytes
            self.limit_bytes = None
            return super()._segment(size, small)


def _outside(costs: Costs) -> int:
    return costs.context_bytes + costs.module_bytes


def _reserved(gpus: Mapping[int, Gpu]) -> dict[int, int]:
    return {index: gpu.allocator.peak_reserved for index, gpu in gpus.items()}


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


def _reasons(
    devices: list[DevicePlan],
    short: Mapping[int, int],
    offloaded: tuple[str, ...],
    placed: DeviceMap,
    cards: Mapping[int, GpuRow],
    *,
    context: int,
    batch: int,
) -> tuple[str, ...]:
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
