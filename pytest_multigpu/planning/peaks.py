"""The plan of a placement: what every GPU will show in use in each phase, and whether it fits.

The numbers come from a replay of the session (:mod:`.replay`), the sentences from
:mod:`.reasons`. Imports units, records and its own part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property

from ..records.machine import Machine
from ..records.plan import Architecture, DeviceMap, Plan, WeightsSource
from .allocator import OTHER_ORDERS, TOP_DOWN
from .barred import why_barred
from .costs import OUTLIERS_FROM, SPARE_SHARE, Costs, costs_for
from .device_maps import OFFLOAD, expand
from .device_plans import device_plan, host_plans
from .known import Known
from .reasons import reasons
from .replay import NEW_TOKENS, Loaded
from .search import Fit
from .use import Use

NEAR = 0.9
"""Of a GPU's room: from there on a plan must fit in whatever order the driver gives addresses, and
in 8 bit wherever a trained model's outliers begin: the game's is one."""


_Used = tuple[dict[int, Use], dict[int, Use], dict[int, int]]


def room(free_bytes: int) -> int:
    """What of a GPU's free bytes a plan may use: a prediction is not exact to the last one."""
    return free_bytes - int(free_bytes * SPARE_SHARE)


class Predictor:
    """One placement of a model on a machine, to be asked about any context."""

    def __init__(
        self,
        architecture: Architecture,
        device_map: DeviceMap,
        machine: Machine,
        *,
        weights: WeightsSource = "synthetic",
        costs: Mapping[int, Costs] | None = None,
        known: Known | None = None,
    ) -> None:
        """
        :param weights: where they come from: loading takes other things beside them.
        :param costs: measured constants by CUDA index, instead of the table's.
        :param known: of this model, where several placements of it are asked about.
        :raises UsageError: a block that the map does not cover.
        """
        self.architecture = architecture
        self.placed = expand(architecture, device_map)
        self.offloaded = tuple(
            block.name
            for block in architecture.blocks
            if self.placed[block.name] in OFFLOAD and architecture.tier != "cpu"
        )
        indices = sorted({place for place in self.placed.values() if isinstance(place, int)})
        visible = machine.visible_gpus
        self.cards = {i: visible[i] for i in indices if i < len(visible)}
        self.limits = {i: self.cards[i].free_bytes if i in self.cards else 0 for i in indices}
        self.rooms = {i: room(limit) for i, limit in self.limits.items()}
        self._prices = {
            i: (costs or {}).get(i)
            or costs_for(
                self.cards[i].capability if i in self.cards else None,
                expandable_segments=machine.expandable_segments,
            )
            for i in indices
        }
        self.weights: WeightsSource = weights
        self._known = known or Known(architecture)
        self._loaded = self._loaded_with(self._prices)

    def _loaded_with(self, prices: Mapping[int, Costs], *, top_down: int = TOP_DOWN) -> Loaded:
        return Loaded(
            self.architecture,
            self.placed,
            prices,
            weights=self.weights,
            top_down=top_down,
            known=self._known,
        )

    def plan(
        self,
        *,
        context_tokens: int,
        batch: int,
        placement: str,
        new_tokens: int = NEW_TOKENS,
    ) -> Plan:
        """Bytes per GPU, whether it fits, why not.

        :param context_tokens: tokens in the cache at the end, prompt and generated, per sequence.
        """
        free, used, short = self._used(context_tokens, batch, new_tokens)
        barred = why_barred(self.architecture, self.cards, context_tokens)
        devices = [
            device_plan(
                self.architecture,
                self.placed,
                index,
                free[index] if index in short else used[index],
                self.limits[index],
                context=context_tokens,
                batch=batch,
            )
            for index in free
        ]
        devices += host_plans(self.architecture, self.placed, context_tokens, batch)
        return Plan(
            architecture=self.architecture,
            weights=self.weights,
            placement=placement,
            context_tokens=context_tokens,
            batch=batch,
            fits=not short and not self.offloaded and not barred,
            reasons=(
                *barred,
                *reasons(
                    devices,
                    short,
                    self.offloaded,
                    self.placed,
                    self.cards,
                    context=context_tokens,
                    batch=batch,
                ),
            ),
            devices=tuple(devices),
            device_map=self.placed,
            offloaded=self.offloaded,
        )

    def fit(self, *, context_tokens: int, batch: int) -> Fit:
        """Whether a plan of that context would fit, without making it."""
        used = self._loaded.run(
            context_tokens=context_tokens, batch=batch, limits=self.rooms, enough_if_short=True
        )
        short = any(use.missing_bytes for use in used.values())
        if not short and self._is_near(used):
            short = any(found[2] for found in self._otherwise(context_tokens, batch))
        barred = why_barred(self.architecture, self.cards, context_tokens)
        return Fit(
            fits=not short and not self.offloaded and not barred,
            spare_bytes=min(
                (self.rooms[index] - use.least_bytes for index, use in used.items()), default=0
            ),
        )

    @cached_property
    def _others(self) -> tuple[Loaded, ...]:
        """The same with addresses in another order, which decides between equal free blocks, and
        with outliers from some layer on. With expandable segments there is one order."""
        others: list[Loaded] = []
        if not any(costs.expandable_segments for costs in self._prices.values()):
            others += [self._loaded_with(self._prices, top_down=order) for order in OTHER_ORDERS]
        if self.architecture.tier == "8bit":
            others += [
                self._loaded_with({i: c.as_trained(first) for i, c in self._prices.items()})
                for first in OUTLIERS_FROM
            ]
        return tuple(others)

    def _is_near(self, used: Mapping[int, Use]) -> bool:
        return any(use.peaks.worst_bytes > NEAR * self.rooms[i] for i, use in used.items())

    def _used(self, context_tokens: int, batch: int, new_tokens: int) -> _Used:
        """By GPU: its use without a limit, and under its own; what those that are short lack,
        here or, near the limit, otherwise."""
        found = self._used_by(self._loaded, context_tokens, batch, new_tokens)
        if found[2] or not self._is_near(found[1]):
            return found
        others = self._otherwise(context_tokens, batch, new_tokens)
        return next((other for other in others if other[2]), found)

    def _otherwise(
        self, context_tokens: int, batch: int, new_tokens: int = NEW_TOKENS
    ) -> Iterator[_Used]:
        for loaded in self._others:
            yield self._used_by(loaded, context_tokens, batch, new_tokens)

    def _used_by(self, loaded: Loaded, context_tokens: int, batch: int, new_tokens: int) -> _Used:
        free = loaded.run(context_tokens=context_tokens, batch=batch, new_tokens=new_tokens)
        tight = {i for i, use in free.items() if use.peaks.worst_bytes > self.rooms[i]}
        if not tight:
            return free, free, {}
        # Near its limit torch gives cached memory back and asks again: that may still do.
        used = loaded.run(
            context_tokens=context_tokens, batch=batch, new_tokens=new_tokens, limits=self.rooms
        )
        short = {
            i: free[i].peaks.worst_bytes - self.rooms[i] for i in tight if used[i].missing_bytes
        }
        return free, used, short


def predict(
    architecture: Architecture,
    device_map: DeviceMap,
    machine: Machine,
    *,
    context_tokens: int,
    batch: int,
    weights: WeightsSource,
    placement: str,
    new_tokens: int = NEW_TOKENS,
    costs: Mapping[int, Costs] | None = None,
) -> Plan:
    """The plan for a model placed by ``device_map``: see :class:`Predictor`."""
    return Predictor(architecture, device_map, machine, weights=weights, costs=costs).plan(
        context_tokens=context_tokens,
        batch=batch,
        placement=placement,
        new_tokens=new_tokens,
    )
