"""One session replayed on simulated GPUs: what each of them holds, phase by phase.

Each GPU has a simulated caching allocator (:mod:`.allocator`); the model is loaded on it
(:mod:`.load`) and its passes are run on it (:mod:`.forward`). To that comes what the process holds
outside the allocator (:mod:`.costs`). Imports units, records and its own part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..records.plan import Architecture, Block, Peaks
from .allocator import Allocator, DeviceFullError
from .costs import Costs
from .device_maps import OFFLOAD
from .forward import Forward, Gpu
from .load import load

NEW_TOKENS = 16
"""Of the context, how many are generated one by one; the rest is the prompt."""


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
