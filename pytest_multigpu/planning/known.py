"""What replays came to, GPU by GPU, so that none is made twice.

What a GPU does hangs on its own blocks alone, and on which of their neighbours are elsewhere:
layers of one kind are alike wherever they stand. So the GPUs in the middle of an even split come to
the same, and of a split that differs from another by one layer two GPUs are to be replayed. Imports
records and its own part.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ..records.plan import Architecture, Block
from ..records.probe import default_layer
from .costs import Costs


class Moment(NamedTuple):
    """One GPU's allocator after a phase: its peaks, and what was in use at the second one."""

    reserved: int
    allocated: int
    kv: int
    logits: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One GPU after generating, or after a probe. Bytes."""

    moments: Mapping[str, Moment]
    """Phase to what it held."""
    loaded_bytes: int
    """In tensors, when the model had been loaded."""
    load_least: int
    """:attr:`.Allocator.least_limit` of loading."""
    least_limit: int
    """The same of what came after."""
    missing_bytes: int
    """With a limit: what the driver lacked when it ran out; 0 if it did not."""


class Own(NamedTuple):
    """What a GPU's replay hangs on."""

    blocks: tuple[Hashable, ...]
    """In order, with the gaps between them."""
    costs: Costs
    probed: int | None
    """Where among them is the layer that a probe reads."""


@dataclass
class Known:
    """Of one model: outcomes by all that they hang on, as :meth:`.Loaded.run` asks for them."""

    architecture: Architecture
    outcomes: dict[Hashable, Outcome] = field(default_factory=dict)

    def __post_init__(self) -> None:
        numbers: dict[Hashable, int] = {}
        self._probed = default_layer(self.architecture.layers) - 1
        self._marks = [numbers.setdefault(mark, len(numbers)) for mark in marks(self.architecture)]

    def own(
        self, runs_on: Sequence[int], held_on: Sequence[int | str], costs: Mapping[int, Costs]
    ) -> dict[int, Own]:
        """By GPU.

        :param runs_on: of each block: the GPU that runs it.
        :param held_on: of each block: where its weights are.
        """
        found: dict[int, list[Hashable]] = {gpu: [] for gpu in costs}
        probed: dict[int, int] = {}
        before: int | None = None
        for block, mark, gpu, place in zip(
            self.architecture.blocks, self._marks, runs_on, held_on, strict=True
        ):
            mine = found[gpu]
            if before is not None and before != gpu:
                found[before].append(_ELSEWHERE)
                if not mine:
                    mine.append(_ELSEWHERE)
            before = gpu
            if block.kind == "layer" and block.layer == self._probed:
                probed[gpu] = len(mine)
            mine.append((mark, place == gpu, costs[gpu].outliers_in(block.layer)))
        return {
            gpu: Own(
                tuple(mine),
                # They are with the blocks.
                replace(costs[gpu], int8_outliers=0.0, int8_outliers_from=0),
                probed.get(gpu),
            )
            for gpu, mine in found.items()
        }


_ELSEWHERE = "elsewhere"


def marks(architecture: Architecture) -> list[Hashable]:
    """Block by block: those with equal ones do the same."""
    kinds = None if architecture.passes is None else architecture.passes.kinds

    def mark(block: Block) -> Hashable:
        kind = None if kinds is None or block.layer is None else kinds[block.layer]
        return replace(block, name="", layer=None), kind

    return [mark(block) for block in architecture.blocks]
