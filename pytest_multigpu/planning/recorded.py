"""A forward pass as it was recorded from the installed transformers, replayed on simulated
allocators.

The steps are ``Architecture.passes``; where the parts of a model lie, what moves between GPUs and
what ``generate`` and a probe do with the results is as for Llama (:mod:`.forward`). Imports records
and its own part.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..records.passes import Pass, Passes, Phase, Size, Step
from ..records.plan import Architecture, Block
from .allocator import Held
from .costs import Costs
from .forward import Forward, Shape
from .gpu import Gpu

_Sized = tuple[Step, int]
"""A step and its size for the pass at hand."""
_Tensors = dict[int, list[Held]]


def forward_of(architecture: Architecture, *, logits_rows: int) -> Forward:
    """What replays this model's passes."""
    if architecture.passes is None:
        return Forward(architecture, logits_rows=logits_rows)
    return Recorded(architecture, architecture.passes, logits_rows=logits_rows)


class Recorded(Forward):
    """Replays recorded passes of one model."""

    def __init__(self, architecture: Architecture, passes: Passes, *, logits_rows: int) -> None:
        super().__init__(architecture, logits_rows=logits_rows)
        self.passes = passes

    def run(
        self,
        blocks: list[tuple[Block, Gpu]],
        *,
        tokens: int,
        batch: int,
        total_tokens: int,
        probe: bool = False,
    ) -> None:
        """One pass of ``tokens`` new tokens for each of ``batch`` sequences."""
        phase: Phase = "probe" if probe else "prefill" if tokens == total_tokens else "decode"
        one = self.passes.find(phase, batch=batch, tokens=total_tokens)
        _Run(self, one, blocks, tokens=tokens, batch=batch, total=total_tokens).go()

    def layer_linears(self, block: Block, batch: int) -> tuple[list[Shape], list[Shape]]:
        assert block.layer is not None  # of kind layer
        one = self.passes.find("decode", batch=batch, tokens=1)
        steps = one.layers[self.passes.kinds[block.layer]].steps
        cached = next((i for i, step in enumerate(steps) if step.op == "cache"), len(steps))
        before, after = (
            [(step.rows, step.columns) for step in part if step.op == "linear"]
            for part in (steps[:cached], steps[cached:])
        )
        return before, after

    def finish(self, head: Gpu, first: Gpu, steps: Sequence[_Sized], size: int, batch: int) -> None:
        """The head's steps, and ``generate``'s with the logits."""
        a = head.allocator
        before = a.logits
        a.logits += size
        made: _Tensors = {}
        for step, step_size in steps:
            if step.op == "take":
                made[step.tensor] = [a.take(step_size)]
            elif step.op == "drop":
                _drop(head, made.pop(step.tensor))
        self._use_logits(head, first, size, batch)
        for held in made.values():
            _drop(head, held)
        a.logits = before


class _Run:
    """One pass: what is alive on which GPU."""

    def __init__(
        self,
        forward: Recorded,
        recorded: Pass,
        blocks: list[tuple[Block, Gpu]],
        *,
        tokens: int,
        batch: int,
        total: int,
    ) -> None:
        self.forward = forward
        self.recorded = recorded
        self.blocks = blocks
        self.tokens = tokens
        self.batch = batch
        self.total = total
        self.first = blocks[0][1]
        self.layers = [self._sized(layer.steps) for layer in recorded.layers]
        self.inputs = [[self._of(size) for size in layer.inputs] for layer in recorded.layers]
        self.attended = [
            _attended(layer.steps, forward.hidden, forward.query) for layer in recorded.layers
        ]
        self.hidden = tokens * batch * forward.hidden * forward.size
        self.kept: list[tuple[Gpu, list[Held]]] = []
        """Until the norm is through."""
        self.late: list[tuple[Gpu, list[Held]]] = []
        """Until the next layer has run."""

    def _of(self, size: Size) -> int:
        return size.of(self.batch, self.total)

    def _sized(self, steps: Sequence[Step]) -> list[_Sized]:
        return [(step, self._of(step.size)) for step in steps]

    def go(self) -> None:
        recorded, first, forward = self.recorded, self.first, self.forward
        held: _Tensors = {}
        self._play(self._sized(recorded.before), first, None, held)
        x, x_gpu = held.pop(recorded.hidden), first
        self.kept = [(first, value) for value in held.values()]
        embedding = x if recorded.hidden_is_kept else None
        captured: tuple[Gpu, Held] | None = None
        for block, gpu in self.blocks:
            if block.kind != "layer":
                continue
            x, x_gpu = self._layer(block, gpu, x, x_gpu, embedding)
            if recorded.phase == "probe" and block.layer == forward.probed:
                captured = (gpu, gpu.allocator.take(self.hidden))
        norm = next((gpu for block, gpu in self.blocks if block.kind == "norm"), x_gpu)
        head = next((gpu for block, gpu in self.blocks if block.kind == "head"), norm)
        moved = [] if norm is x_gpu else [norm.allocator.take(self.hidden)]
        normed: _Tensors = {}
        self._play(self._sized(recorded.norm), norm, None, normed)
        _drop(norm, moved)
        if x is not embedding:
            _drop(x_gpu, x)
        for gpu, value in (*self.late, *self.kept):
            _drop(gpu, value)
        if embedding is not None:
            _drop(first, embedding)
        if recorded.phase != "probe":
            steps = self._sized(recorded.head)
            forward.finish(head, first, steps, self._of(recorded.logits), self.batch)
        for value in normed.values():
            _drop(norm, value)
        if captured is not None:
            gpu, output = captured
            gpu.allocator.drop(gpu.allocator.take(self.hidden // forward.size * 4))
            gpu.allocator.drop(output)

    def _layer(
        self, block: Block, gpu: Gpu, x: list[Held], x_gpu: Gpu, embedding: list[Held] | None
    ) -> tuple[list[Held], Gpu]:
        assert block.layer is not None  # of kind layer
        if gpu.elsewhere:
            return self._passed_over(gpu, x, x_gpu, embedding)
        kind = self.forward.passes.kinds[block.layer]
        layer, a = self.recorded.layers[kind], gpu.allocator
        moved = [] if gpu is x_gpu else [a.take(self.hidden)]
        beside = [] if gpu is self.first else [a.take(size) for size in self.inputs[kind]]
        made: _Tensors = {}
        self._play(self.layers[kind], gpu, block, made)
        _drop(gpu, beside)
        if layer.output:
            y = made.pop(layer.output)
            _drop(gpu, moved)
            if x is not embedding:
                _drop(x_gpu, x)
        elif moved:  # in place, on its copy
            y = moved
            if x is not embedding:
                _drop(x_gpu, x)
        else:
            y = x
        for owner, value in self.late:
            _drop(owner, value)
        self.late = [(gpu, made.pop(tensor)) for tensor in layer.late]
        self.kept += [(gpu, value) for value in made.values()]
        return y, gpu

    def _passed_over(
        self, gpu: Gpu, x: list[Held], x_gpu: Gpu, embedding: list[Held] | None
    ) -> tuple[list[Held], Gpu]:
        """A layer elsewhere: its input has been copied there, and what was late is gone."""
        if x is not embedding:
            _drop(x_gpu, x)
        for owner, value in self.late:
            _drop(owner, value)
        self.late = []
        return [], gpu

    def _play(self, steps: Iterable[_Sized], gpu: Gpu, block: Block | None, made: _Tensors) -> None:
        """Takes and drops on one GPU; what is left is in ``made``."""
        forward, a = self.forward, gpu.allocator
        for step, size in steps:
            op = step.op
            if op == "take":
                made[step.tensor] = [a.take(size)]
            elif op == "drop":
                for held in made.pop(step.tensor):
                    a.drop(held)
            elif op == "linear":
                made[step.tensor] = [
                    forward.linears.run(
                        a,
                        gpu.costs,
                        size,
                        step.rows,
                        step.columns,
                        outliers=self._outliers(step, gpu.costs, block),
                    )
                ]
            elif op == "mask":
                made[step.tensor] = gpu.mask_for_kernel(size, self.total, forward.size)
            elif op == "bias":
                made[step.tensor] = gpu.mask_aligned(size, self.total, forward.size)
            elif block is not None:
                gpu.extend_cache(block, self.tokens, self.batch, self.total)

    def _outliers(self, step: Step, costs: Costs, block: Block | None) -> float:
        if step.columns == self.forward.intermediate:
            return costs.int8_outliers_down
        if step in self.attended:
            return costs.int8_outliers_attended
        return costs.outliers_in(None if block is None else block.layer)


def _attended(steps: Sequence[Step], hidden: int, query: int) -> Step | None:
    """A layer's last Linear of that shape is the one after attention."""
    shaped = [s for s in steps if s.op == "linear" and (s.rows, s.columns) == (hidden, query)]
    return shaped[-1] if shaped else None


def _drop(gpu: Gpu, held: Iterable[Held]) -> None:
    for one in held:
        gpu.allocator.drop(one)
