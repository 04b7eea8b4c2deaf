"""One session replayed on simulated GPUs: what each of them holds, phase by phase.

Each GPU has a simulated caching allocator (:mod:`.allocator`, :mod:`.expandable`); the model is
loaded on it (:mod:`.load`) and its passes are run on it (:mod:`.forward`), unless what it does is
known (:mod:`.known`). To that comes what the process holds outside the allocator (:mod:`.use`).
Imports records and its own part.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import NamedTuple

from ..records.plan import Architecture, Block, WeightsSource
from .allocator import TOP_DOWN, Allocator, Elsewhere
from .costs import Costs
from .expandable import ExpandableAllocator
from .gpu import Gpu
from .known import Known, Moment, Outcome
from .load import load
from .recorded import forward_of
from .use import Use, use_of

NEW_TOKENS = 2
"""Of the context, how many are generated one by one; the rest is the prompt."""


def kv_bytes(block: Block, context_tokens: int, batch: int) -> int:
    """KV cache of one block: sliding-window layers keep ``kv_window`` tokens at most."""
    tokens = context_tokens
    if block.kv_window is not None:
        tokens = min(tokens, block.kv_window)
    return block.kv_bytes_per_token * tokens * batch


class _Sizes(NamedTuple):
    context_tokens: int
    batch: int
    prompt: int
    """Tokens of a sequence before the first is generated."""


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
        known: Known | None = None,
    ) -> None:
        """
        :param placed: a key for each block; those on cpu or disk run on the first GPU.
        :param top_down: the order in which the driver gives addresses, see :mod:`.allocator`.
        :param known: what other splits of this model came to, and what this one will.
        """
        places = [placed[block.name] for block in architecture.blocks]
        indices = sorted({place for place in places if isinstance(place, int)})
        self.architecture = architecture
        self.costs = {index: costs[index].in_tier(architecture.tier) for index in indices}
        self._weights = weights
        self._top_down = top_down
        self._blocks = {
            index: [
                block
                for block, place in zip(architecture.blocks, places, strict=True)
                if place == index
            ]
            for index in indices
        }
        self._runs_on = [
            place if isinstance(place, int) else indices[0] for place in places if indices
        ]
        self._known = known or Known(architecture)
        self._own = self._known.own(self._runs_on, places, self.costs) if indices else {}
        self._gpus: dict[int, Gpu] = {}

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
        sizes = _Sizes(context_tokens, batch, max(1, context_tokens - max(1, new_tokens)))
        generated = self._outcomes("generate", sizes, limits)
        short = any(outcome.missing_bytes for outcome in generated.values())
        probed: Mapping[int, Outcome] = {}
        if probe and not (enough_if_short and short):
            probed = self._outcomes("probe", sizes, limits)
        return {
            index: use_of(
                self.architecture,
                self._blocks[index],
                self.costs[index],
                self._weights,
                outcome,
                probed.get(index),
            )
            for index, outcome in generated.items()
        }

    def _outcomes(
        self, work: str, sizes: _Sizes, limits: Mapping[int, int] | None
    ) -> dict[int, Outcome]:
        """By GPU. Those that are not known yet are replayed, of equal ones the first."""
        outcomes = self._known.outcomes
        keys: dict[int, Hashable] = {}
        for index, own in self._own.items():
            limit = None if limits is None else limits[index]
            mine = own if work == "probe" else own._replace(probed=None)
            keys[index] = (work, sizes, limit, self._weights, self._top_down, mine)
        new: dict[Hashable, int] = {}
        for index, key in keys.items():
            if key not in outcomes:
                new.setdefault(key, index)
        if new:
            gpus = {index: self._started(index, limits) for index in new.values()}
            moments = {"load": _begin(gpus)}
            moments.update(self._passes(work, gpus, sizes))
            for key, index in new.items():
                loaded, started = self._loaded(index).allocator, gpus[index].allocator
                outcomes[key] = Outcome(
                    moments={phase: at[index] for phase, at in moments.items()},
                    loaded_bytes=loaded.allocated,
                    load_least=loaded.least_limit,
                    least_limit=started.least_limit,
                    missing_bytes=started.missing_bytes,
                )
        return {index: outcomes[key] for index, key in keys.items()}

    def _passes(
        self, work: str, gpus: Mapping[int, Gpu], sizes: _Sizes
    ) -> dict[str, dict[int, Moment]]:
        """Phase by phase; layers on other GPUs than those are passed over."""
        forward = forward_of(self.architecture, logits_rows=1)
        elsewhere = Gpu(allocator=Elsewhere(), costs=self.costs[self._runs_on[0]])
        blocks = [
            (block, gpus.get(index, elsewhere))
            for block, index in zip(self.architecture.blocks, self._runs_on, strict=True)
        ]
        context, batch, prompt = sizes
        if work == "probe":
            forward.run(blocks, tokens=prompt, batch=batch, total_tokens=prompt, probe=True)
            return {"probe": _moments(gpus)}
        forward.run(blocks, tokens=prompt, batch=batch, total_tokens=prompt)
        prefill = _moments(gpus)
        for step in range(prompt + 1, context + 1):
            if step == prompt + 1:
                forward.run(blocks, tokens=1, batch=batch, total_tokens=step)
            else:
                forward.extend(blocks, batch=batch, total_tokens=step)
        return {"prefill": prefill, "decode": _moments(gpus)}

    def _started(self, index: int, limits: Mapping[int, int] | None) -> Gpu:
        """A GPU with the model on it, to go on from: the kernels of a pass come beside it."""
        loaded = self._loaded(index)
        costs, allocator = loaded.costs, loaded.allocator.copy()
        if limits is not None:
            room = limits[index] - costs.context_bytes
            if allocator.peak_reserved > room:
                allocator = self._load(index, room).allocator
            if not allocator.missing_bytes:
                allocator.limit_to(room - costs.module_bytes)
        allocator.least_limit = allocator.reserved
        return Gpu(allocator=allocator, costs=costs)

    def _loaded(self, index: int) -> Gpu:
        """Without a limit; once, since it does not depend on the context."""
        if index not in self._gpus:
            self._gpus[index] = self._load(index, None)
        return self._gpus[index]

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


def replay(
    architecture: Architecture,
    placed: Mapping[str, int | str],
    costs: Mapping[int, Costs],
    *,
    context_tokens: int,
    batch: int,
    new_tokens: int = NEW_TOKENS,
    probe: bool = True,
    known: Known | None = None,
) -> dict[int, Use]:
    """One session on GPUs without a limit; see :class:`Loaded` and :meth:`Loaded.run`."""
    loaded = Loaded(architecture, placed, costs, known=known)
    return loaded.run(
        context_tokens=context_tokens, batch=batch, new_tokens=new_tokens, probe=probe
    )


def _begin(gpus: Mapping[int, Gpu]) -> dict[int, Moment]:
    """The first matrix product takes its workspace; the peaks of what was before."""
    before = _moments(gpus)
    for gpu in gpus.values():
        gpu.allocator.restart_peaks()
        gpu.allocator.take(gpu.costs.workspace_bytes)
    return before


def _moments(gpus: Mapping[int, Gpu]) -> dict[int, Moment]:
    """The peaks of the phase that ends here. What is reserved stays so from phase to phase."""
    found = {}
    for index, gpu in gpus.items():
        a = gpu.allocator
        found[index] = Moment(a.peak_reserved, a.peak_allocated, a.peak_kv, a.peak_logits)
        a.restart_allocated_peak()
    return found
