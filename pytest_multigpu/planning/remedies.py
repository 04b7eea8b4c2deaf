"""What would make a plan that does not fit fit. Imports units, records and its own part.

Every offer was planned and fits: what it names, once followed, is a plan that fits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from ..records.machine import Gpu, Machine
from ..records.plan import Architecture, Plan, Tier
from ..records.tiers import GPU_TIERS
from ..units import gib
from .balance import balanced_plan
from .barred import beyond_positions, runs_on, why_barred
from .catalogue import CATALOGUE, GpuType
from .fit import largest_context
from .grown import GROWS, may_fit
from .longest import Spread, longest_balanced
from .peaks import Predictor
from .reasons import NOTABLE
from .rent import by_price, fewest, least_own
from .simulate import simulate

WOULD_DO = "with nothing else on them would do with --gpu-placement=balanced: free their memory"


def remedies(
    plan: Plan,
    machine: Machine,
    *,
    architectures: Mapping[Tier, Architecture] | None = None,
    most_gpus: int = 16,
    catalogue: tuple[GpuType, ...] = CATALOGUE,
    spread: Spread = balanced_plan,
    grown: Plan | None = None,
) -> tuple[str, ...]:
    """What would make a plan that does not fit fit, the least change first; () if it fits.

    :param architectures: the same model in the other tiers, to look for one that fits.
    :param catalogue: what could be rented where nothing else does.
    :param grown: the same with expandable segments, where only that fits: :func:`.fits_grown`.
    """
    if plan.fits:
        return ()
    if plan.architecture.tier == "cpu":
        return tuple(_shorter_as_placed(plan, machine))
    if not machine.visible:
        return ()
    search = _Search(plan, machine, architectures or {}, most_gpus, catalogue, spread, grown)
    return tuple(search.found())


class _Search:
    """One plan's remedies."""

    def __init__(
        self,
        plan: Plan,
        machine: Machine,
        architectures: Mapping[Tier, Architecture],
        most_gpus: int,
        catalogue: tuple[GpuType, ...],
        spread: Spread,
        grown: Plan | None,
    ) -> None:
        self.plan = plan
        self.machine = machine
        self.architectures = {plan.architecture.tier: plan.architecture, **architectures}
        self.most_gpus = most_gpus
        self.catalogue = catalogue
        self.spread = spread
        self.grown = grown
        self.placement = "" if plan.placement == "balanced" else "--gpu-placement=balanced "

    def found(self) -> Iterator[str]:
        plan = self.plan
        mended = self._spread(plan.architecture) if self.placement else None
        as_placed = [*_shorter_as_placed(plan, self.machine)] if self.placement else []
        if mended is not None:
            yield f"--gpu-placement=balanced fits: {fullest(mended)}"
        if (grown := self.grown) is not None:
            changes = "" if grown.placement == plan.placement else f" {self.placement.strip()}"
            yield f"{GROWS}{changes} fits: {fullest(grown)}"
        yield from as_placed
        if mended is None and not as_placed and self._has_room():
            yield from self._shorter()
        if mended is None and plan.batch > 1 and self._has_room():
            yield from self._smaller_batch()
        others = [*self._other_numbers()]
        yield from others
        # Nothing needs to be rented or freed where no machine would do, or this one does.
        asked = bool(as_placed) and beyond_positions(plan.architecture, plan.context_tokens)
        mends = mended is not None or grown is not None
        mends |= bool(plan.architecture.refused and others)
        if not mends and not asked and (more := self._more_gpus() or self._to_rent()):
            yield more

    def _spread(
        self, architecture: Architecture, *, tokens: int | None = None, batch: int | None = None
    ) -> Plan | None:
        """The balanced plan on this machine, if it fits."""
        tokens = self.plan.context_tokens if tokens is None else tokens
        batch = self.plan.batch if batch is None else batch
        if not may_fit(architecture, self.machine, tokens, batch):
            return None
        made = self.spread(architecture, self.machine, tokens, batch)
        return made if made is not None and made.fits else None

    def _shorter(self) -> Iterator[str]:
        """A shorter context, with the layers balanced anew for it."""
        asked = self.plan.context_tokens
        shorter = longest_balanced(
            self.plan.architecture,
            self.machine,
            batch=self.plan.batch,
            near=asked - 1,
            most=asked - 1,
            spread=self.spread,
        )
        if shorter is not None:
            tokens = shorter.context_tokens
            yield f"{self.placement}--gpu-context={tokens} fits: {fullest(shorter)}"

    def _smaller_batch(self) -> Iterator[str]:
        """Fewer sequences of the context asked for, with the layers balanced anew for them."""
        plan, tokens = self.plan, self.plan.context_tokens
        one = self._spread(plan.architecture, batch=1)
        if one is None:
            return
        placed = Predictor(plan.architecture, one.device_map, self.machine, weights=one.weights)
        low, high = 1, plan.batch
        while high - low > 1:
            middle = (low + high) // 2
            if placed.fit(context_tokens=tokens, batch=middle).fits:
                low = middle
            else:
                high = middle
        fewer = self._spread(plan.architecture, batch=low)
        low, fewer = (low, fewer) if fewer is not None else (1, one)
        yield f"{self.placement}--gpu-batch={low} fits: {fullest(fewer)}"

    def _has_room(self) -> bool:
        """For the weights at least: else no context and no batch is small enough."""
        return may_fit(self.plan.architecture, self.machine, 1, 1)

    def _other_numbers(self) -> Iterator[str]:
        """A lower tier, or float16 on cards without bfloat16."""
        tier = self.plan.architecture.tier
        lowers = GPU_TIERS[GPU_TIERS.index(tier) + 1 :]
        if self.plan.architecture.refused:  # not for want of memory: a better one may do
            lowers = tuple(other for other in GPU_TIERS if other != tier)
        for lower in lowers:
            architecture = self.architectures.get(lower)
            other = None if architecture is None else self._spread(architecture)
            if other is not None:
                yield f"--gpu-tier={lower} --gpu-placement=balanced fits: {fullest(other)}"
                return
        plain = self.architectures.get("16bit")
        if plain is not None and plain.dtype == "bfloat16":
            half = replace(plain, dtype="float16")  # as many bytes
            gpus = self.machine.visible_gpus
            if any(not runs_on(gpu.capability, plain) for gpu in gpus):
                other = self._spread(half)
                if other is not None:
                    yield f"--gpu-tier=fp16 --gpu-placement=balanced fits: {fullest(other)}"

    def _more_gpus(self) -> str:
        """How many GPUs like the machine's largest the model needs, or what is to be freed."""
        plan, gpus = self.plan, self.machine.visible_gpus
        largest = max(gpus, key=lambda gpu: gpu.total_bytes)
        if not largest.total_bytes:
            return ""
        if why_barred(plan.architecture, {0: largest}, plan.context_tokens):
            return ""
        alike = sum(_same_card(gpu, largest) for gpu in gpus)
        freed = self._fits_freed()
        for count, other in self._counts(largest):
            what = f"{count} x {largest.name}"
            if count <= alike and freed:
                return f"{what} {WOULD_DO}"
            if count > alike and not freed:
                return f"rent {what}: with --gpu-placement=balanced {fullest(other)}"
        return f"the GPUs {WOULD_DO}" if freed else ""

    def _fits_freed(self) -> bool:
        """Others hold memory worth a word, and without them the balanced plan would fit."""
        plan, machine = self.plan, self.machine
        if not any(gpu.used_bytes >= NOTABLE for gpu in machine.visible_gpus):
            return False
        made = self.spread(plan.architecture, machine.idle(), plan.context_tokens, plan.batch)
        return made is not None and made.fits

    def _counts(self, card: Gpu) -> Iterator[tuple[int, Plan]]:
        """Numbers of such cards, idle, on which the plan fits."""
        plan = self.plan
        free = card.total_bytes - card.reserved_bytes
        count = plan.weights_bytes // free + 1
        while count <= self.most_gpus:
            cards = tuple(
                replace(card, index=i, cuda_index=i, free_bytes=free, used_bytes=0)
                for i in range(count)
            )
            idle = replace(self.machine, gpus=cards, visible=tuple(range(count)))
            other = self.spread(plan.architecture, idle, plan.context_tokens, plan.batch)
            if other is None:
                return
            if other.fits:
                yield count, other
            shared = sum(device.weights_bytes + device.kv_bytes for device in other.devices)
            own = min(least_own(device.parts) for device in other.devices)
            count = max(count + 1, fewest(shared, own, free))

    def _to_rent(self) -> str:
        """The cheapest of the catalogue; for less than was asked for where nothing has room,
        unless this machine has room for that."""
        plan, grows = self.plan, self.machine.expandable_segments
        tiers = GPU_TIERS[GPU_TIERS.index(plan.architecture.tier) :]
        tokens = plan.context_tokens
        most = min(tokens, plan.architecture.max_context or tokens)
        for context, batch in dict.fromkeys([(most, plan.batch), (most, 1)]):
            if self._spread(plan.architecture, tokens=context, batch=batch) is not None:
                return ""  # an offer already
            for tier in tiers:
                architecture = self.architectures.get(tier)
                if architecture is None:
                    continue
                changes = "" if tier == plan.architecture.tier else f"--gpu-tier={tier} "
                changes += "" if context == tokens else f"--gpu-context={context} "
                changes += "" if batch == plan.batch else f"--gpu-batch={batch} "
                for row in by_price(
                    architecture,
                    context_tokens=context,
                    batch=batch,
                    catalogue=self.catalogue,
                    expandable_segments=grows,
                ):
                    there = simulate(row.spec, self.catalogue)
                    there = replace(there, expandable_segments=grows)
                    other = self.spread(architecture, there, context, batch)
                    if other is not None and other.fits:
                        return (
                            f"rent {row.spec}: with {changes}--gpu-placement=balanced "
                            f"{fullest(other)}"
                        )
        return ""


def _shorter_as_placed(plan: Plan, machine: Machine) -> Iterator[str]:
    if not plan.offloaded:
        context = largest_context(
            plan.architecture,
            plan.device_map,
            machine,
            batch=plan.batch,
            weights=plan.weights,
        )
        if 0 < context < plan.context_tokens:
            yield f"--gpu-context={context} is the longest that fits as placed"


def _same_card(one: Gpu, other: Gpu) -> bool:
    return (one.name, one.total_bytes) == (other.name, other.total_bytes)


def fullest(plan: Plan) -> str:
    """``GPU 0 would peak at 133.5 GiB of 139.8 GiB``: the one with the least left by share."""
    device = max(plan.devices, key=lambda d: d.peak_bytes / d.limit_bytes)
    return (
        f"GPU {device.device.removeprefix('cuda:')} would peak at {gib(device.peak_bytes)} of "
        f"{gib(device.limit_bytes)}"
    )
