"""What a model's forward pass takes from the allocator, step by step, for any tokens and batch.

Recorded by ``model.passes`` from the installed transformers' own forward, replayed by
``planning.recorded``. Plain data: it goes into the disk cache as JSON.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

Op = Literal["take", "drop", "linear", "cache", "mask", "bias"]
"""``take`` memory, ``drop`` it; a ``linear`` that 8 and 4 bit quantise; K and V go into the
``cache``; an attention kernel gets a boolean ``mask``, or a ``bias`` in the model's dtype."""
Phase = Literal["prefill", "decode", "probe"]


class Size(NamedTuple):
    """``batch^batch_power x (fixed + linear x tokens + square x tokens^2)``.

    ``tokens`` are those of one sequence: of the prompt, or in decode all in the cache.
    """

    fixed: int = 0
    linear: int = 0
    square: int = 0
    batch_power: int = 0

    def of(self, batch: int, tokens: int) -> int:
        each = self.fixed + tokens * (self.linear + tokens * self.square)
        return each * batch if self.batch_power else each


class Step(NamedTuple):
    """One allocation or release, in the order of the pass."""

    op: Op
    tensor: int = 0
    """Names what is taken, to be dropped by the same number. A linear's is its output."""
    size: Size = Size()
    """Bytes of a ``take``; rows of a linear's input; elements of a ``mask`` or ``bias``."""
    rows: int = 0
    columns: int = 0
    """A linear's weight is ``(rows, columns)``."""


@dataclass(frozen=True, kw_only=True)
class LayerPass:
    """One kind of decoder layer. What it gets stays with its caller."""

    steps: tuple[Step, ...]
    output: int
    """The tensor that the next layer gets."""
    late: tuple[int, ...] = ()
    """Tensors that live until the next layer has run."""
    inputs: tuple[Size, ...] = ()
    """Bytes of what else it gets (rotary angles, masks): copied onto a GPU that is not the first,
    for as long as it runs."""
    kernels: int = 0
    """Tensors that it makes, large or small, views left out: about as many kernels are launched."""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One forward pass in one situation. What a part takes and does not drop lives on: of
    ``before`` and the layers until the norm is through, of the rest until the end."""

    phase: Phase
    batched: bool
    """Several sequences of unequal lengths, with a padding mask; else one."""
    beyond: bool
    """As many tokens as ``Passes.window``, or more."""
    before: tuple[Step, ...]
    """Up to the first layer."""
    hidden: int
    """What the first layer gets, of ``before``."""
    hidden_is_kept: bool
    """It lives until the norm is through; else until the first layer has run."""
    layers: tuple[LayerPass, ...]
    """By kind."""
    norm: tuple[Step, ...]
    head: tuple[Step, ...]
    logits: Size
    """Bytes of what the head returns; a step of ``head`` takes them."""


@dataclass(frozen=True, kw_only=True)
class Passes:
    """Every situation that was recorded."""

    kinds: tuple[int, ...]
    """Decoder layer to its kind."""
    window: int | None
    """Tokens from which the passes differ (the smallest sliding window); None if they never do."""
    recorded: tuple[Pass, ...]
    deep_inputs: tuple[str, ...] = ()
    """Linears that 8 and 4 bit quantise and whose input has more than three dimensions."""
    bare_inputs: tuple[str, ...] = ()
    """Those that take the residual stream as it is, without a norm before them."""

    def find(self, phase: Phase, *, batch: int, tokens: int) -> Pass:
        """The pass for ``tokens`` of each sequence in the cache.

        :raises LookupError: that situation was not recorded.
        """
        wanted = (phase, batch > 1, self.window is not None and tokens >= self.window)
        for one in self.recorded:
            if (one.phase, one.batched, one.beyond) == wanted:
                return one
        raise LookupError(f"no pass was recorded for {wanted}")


def passes_from_json(entry: dict[str, Any]) -> Passes:
    """The inverse of ``dataclasses.asdict`` and JSON.

    :raises TypeError: of another form.
    :raises KeyError: of another form.
    """
    return Passes(
        kinds=tuple(entry["kinds"]),
        window=entry["window"],
        recorded=tuple(
            Pass(
                **{
                    **one,
                    "before": _steps(one["before"]),
                    "norm": _steps(one["norm"]),
                    "head": _steps(one["head"]),
                    "logits": Size(*one["logits"]),
                    "layers": tuple(
                        LayerPass(
                            steps=_steps(layer["steps"]),
                            output=layer["output"],
                            late=tuple(layer["late"]),
                            inputs=tuple(Size(*size) for size in layer["inputs"]),
                            kernels=layer["kernels"],
                        )
                        for layer in one["layers"]
                    ),
                }
            )
            for one in entry["recorded"]
        ),
        deep_inputs=tuple(entry["deep_inputs"]),
        bare_inputs=tuple(entry["bare_inputs"]),
    )


def _steps(entry: list[list[Any]]) -> tuple[Step, ...]:
    return tuple(
        Step(op, tensor, Size(*size), rows, columns) for op, tensor, size, rows, columns in entry
    )
