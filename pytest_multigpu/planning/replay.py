"""One session replayed on simulated GPUs: what each of them holds, phase by phase.

Each GPU has a simulated caching allocator (:mod:`.allocator`, :mod:`.expandable`); the model is
loaded on it (:mod:`.load`) and its passes are run on it (:mod:`.forward`). To that comes what the
process holds outside the allocator (:mod:`.costs`). Imports units, records and its own part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ..records.plan import Architecture, Block, Parts, Peaks, WeightsSource
from .allocator import TOP_DOWN, Allocator
from .costs import Costs
from .expandable import ExpandableAllocator
from .gpu import Gpu
from .load import load, scratch_sizes
from .recorded import forward_of

NEW_TOKENS = 2
"""Of the context, how many are generated one by one; the rest is the prompt."""


@dataclass(frozen=True, kw_only=True)
class Use:
    """One GPU after a replay. Bytes."""

    parts: Mapping[str, Parts]
    """Phase to what is in use, as NVML shows it. Without ``probe`` if that was not replayed."""
    allocated_peak_bytes: int
    """In tensors, at the worst moment after loading."""
    fixed_bytes: int
    """Outside torch's allocator, plus the cuBLAS workspace."""
    missing_bytes: int
    """With a limit: what the driver lacked when it ran out; 0 if it did not."""
    least_bytes: int
    """About the fewest free bytes with which this GPU would do."""

    @property
    def peaks(self) -> Peaks:
        return Peaks(**{f"{phase}_bytes": parts.total_bytes for phase, parts in self.parts.items()})

    @property
    def activation_bytes(self) -> int:
        """The most that a phase holds at once beyond weights and KV; workspaces not counted."""
        return max(parts.activations_bytes + parts.logits_bytes for parts in self.parts.values())


class _Moment(NamedTuple):
    """One GPU's allocator after a phase: its peaks, and what was in use at the second one."""

    reserved: int
    allocated: int
    kv: int
    logits: int


def kv_bytes(block: Block, context_tokens: int, batch: int) -> int:
    """KV cache of one block: sliding-window layers keep ``kv_window`` tokens at most."""
    tokens = context_tokens
    if block.kv_window is not None:
        tokens = min(tokens, block.kv_window)
    return block.kv_bytes_per_token * tokens * batch


class Loaded:
    """A model loaded on simulated GPUs: where every session with it begins.

    Loading does not depend on the context, and takes a third of a replay: who asks about several
    contexts keeps this.
    """

    def __init__(
        self,
        architecture: Architecture,
        placed: Mapping[str, int | str],
        costs: Mapping[int, Costs],
        *,
        weights: WeightsSource = "synthetic",
        top_down: int = TOP_DOWN,
    ) -> None:
        """
        :param placed: a key for each block; those on cpu or disk run on the first GPU.
        :param top_down: the order in which the driver gives addresses, see :mod:`.allocator`.
        """
        indices = sorted({place for place in placed.values() if isinstance(place, int)})
        self.architecture = architecture
        self.costs = {index: costs[index].in_tier(architecture.tier) for index in indices}
        self._weights = weights
        self._top_down = top_down
        self._blocks = {
            index: [block for block in architecture.blocks if placed[block.name] == index]
            for index in indices
        }
        self._places = [placed[block.name] for block in architecture.blocks]
        self._gpus = {index: self._load(index, None) for index in indices}

    def run(
        self,
        *,
        context_tokens: int,
        batch: int,
        new_tokens: int = NEW_TOKENS,
        limits: Mapping[int, int] | None = None,
        probe: bool = True,
        enough_if_short: bool = False,
    ) -> dict[int, Use]:
        """What each GPU holds in each phase.

        Prefill and the decode steps after it start from the loaded model; so does the probe, a
        pass over the same tokens without cache and head.

        Under ``limits`` a GPU that runs out reports ``missing_bytes`` and the replay goes on
        without a limit on it, so that one call finds every GPU that is short.

        :param enough_if_short: leave the probe out where a GPU was short before it.
        """
        if not self._gpus:
            return {}
        forward = forward_of(self.architecture, logits_rows=1)
        prompt = max(1, context_tokens - max(1, new_tokens))
        gpus = self._started(limits)
        moments = {"load": _begin(gpus)}
        blocks = self._on(gpus)
        forward.run(blocks, tokens=prompt, batch=batch, total_tokens=prompt)
        moments["prefill"] = _moments(gpus)
        for step in range(prompt + 1, context_tokens + 1):
            if step == prompt + 1:
                forward.run(blocks, tokens=1, batch=batch, total_tokens=step)
            else:
                forward.extend(blocks, batch=batch, total_tokens=step)
        moments["decode"] = _moments(gpus)
        probed = gpus
        short = any(gpu.allocator.missing_bytes for gpu in gpus.values())
        if probe and not (enough_if_short and short):
            probed = self._started(limits)
            _begin(probed)
            on_probed = self._on(probed)
            forward.run(on_probed, tokens=prompt, batch=batch, total_tokens=prompt, probe=True)
            moments["probe"] = _moments(probed)
        return {
            index: Use(
                parts={
                    phase: self._parts(index, phase, at[index]) for phase, at in moments.items()
                },
                allocated_peak_bytes=max(
                    at[index].allocated for phase, at in moments.items() if phase != "load"
                ),
                fixed_bytes=outside(gpu.costs) + gpu.costs.workspace_bytes,
                least_bytes=max(
                    self._gpus[index].allocator.least_limit + gpu.costs.context_bytes,
                    gpu.allocator.least_limit + outside(gpu.costs),
                    probed[index].allocator.least_limit + outside(gpu.costs),
                ),
                missing_bytes=probed[index].allocator.missing_bytes or gpu.allocator.missing_bytes,
            )
            for index, gpu in gpus.items()
        }

    def _parts(self, index: int, phase: str, moment: _Moment) -> Parts:
        costs, blocks = self.costs[index], self._blocks[index]
        weights = sum(block.weights_bytes for block in blocks)
        if phase == "load":
            transient = sum(scratch_sizes(self.architecture, blocks, self._weights))
            return Parts(
                context_bytes=costs.context_bytes,
                weights_bytes=weights,
                transient_bytes=transient,
                slack_bytes=moment.reserved - weights - transient,
            )
        used = moment.allocated - self._gpus[index].allocator.allocated - costs.workspace_bytes
        return Parts(
            context_bytes=outside(costs),
            weights_bytes=weights,
            kv_bytes=moment.kv,
            activations_bytes=used - moment.kv - moment.logits,
            logits_bytes=moment.logits,
            workspace_bytes=costs.workspace_bytes,
            slack_bytes=moment.reserved - weights - costs.workspace_bytes - used,
        )

    def _started(self, limits: Mapping[int, int] | None) -> dict[int, Gpu]:
        """Each GPU with the model on it, to go on from: the kernels of a pass come beside it."""
        gpus = {}
        for index, loaded in self._gpus.items():
            costs, allocator = loaded.costs, loaded.allocator.copy()
            if limits is not None:
                room = limits[index] - costs.context_bytes
                if allocator.peak_reserved > room:
                    allocator = self._load(index, room).allocator
                if not allocator.missing_bytes:
                    allocator.limit_to(room - costs.module_bytes)
            allocator.least_limit = allocator.reserved
            gpus[index] = Gpu(allocator=allocator, costs=costs)
        return gpus

    def _load(self, index: int, limit: int | None) -> Gpu:
        costs = self.costs[index]
        made: Allocator
        if costs.expandable_segments:
            made = ExpandableAllocator(limit)
        else:
            made = Allocator(limit, top_down=self._top_down)
        gpu = Gpu(allocator=made, costs=costs)
        load(gpu, self.architecture, self._blocks[index], self._weights)
        return gpu

    def _on(self, gpus: Mapping[int, Gpu]) -> list[tuple[Block, Gpu]]:
        """The blocks in forward order, each with the GPU that runs it."""
        first = next(iter(gpus.values()))
        return [
            (block, gpus[place] if isinstance(place, int) else first)
            for block, place in zip(self.architecture.blocks, self._places, strict=True)
        ]


def replay(
    architecture: Architecture,
    placed: Mapping[str, int | str],
    costs: Mapping[int, Costs],
    *,
    context_tokens: int,
    batch: int,
    new_tokens: int = NEW_TOKENS,
    probe: bool = True,
) -> dict[int, Use]:
    """One session on GPUs without a limit; see :meth:`Loaded.run`."""
    loaded = Loaded(architecture, placed, costs)
    return loaded.run(
        context_tokens=context_tokens, batch=batch, new_tokens=new_tokens, probe=probe
    )


def outside(costs: Costs) -> int:
    """Bytes that a process which has generated holds outside torch's allocator."""
    return costs.context_bytes + costs.module_bytes


def _begin(gpus: Mapping[int, Gpu]) -> dict[int, _Moment]:
    """The first matrix product takes its workspace; the peaks of what was before."""
    before = _moments(gpus)
    for gpu in gpus.values():
        gpu.allocator.restart_peaks()
        gpu.allocator.take(gpu.costs.workspace_bytes)
    return before


def _moments(gpus: Mapping[int, Gpu]) -> dict[int, _Moment]:
    """The peaks of the phase that ends here. What is reserved stays so from phase to phase."""
    found = {}
    for index, gpu in gpus.items():
        a = gpu.allocator
        found[index] = _Moment(a.peak_reserved, a.peak_allocated, a.peak_kv, a.peak_logits)
        a.restart_allocated_peak()
    return found
