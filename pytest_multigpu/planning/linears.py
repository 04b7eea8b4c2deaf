"""What one Linear takes from the allocator on its way, in each tier.

The order of allocations and releases is that of ``torch.nn.functional.linear`` and of bitsandbytes'
``Linear8bitLt`` and ``Linear4bit`` (``autograd/_functions.py``, ``backends/cuda/ops.py``).
Imports records and its own part.
"""

from __future__ import annotations

from ..records.plan import Architecture
from .allocator import Allocator, Held
from .costs import Costs

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


class Linears:
    """The Linears of one model's layers. ``t`` is tokens x sequences; weights are
    ``(rows, columns)``."""

    def __init__(self, architecture: Architecture) -> None:
        self.size = DTYPE_BYTES[architecture.dtype]
        self.tier = architecture.tier
        self.cast_to_half = architecture.dtype != "float16"

    def run(
        self, a: Allocator, costs: Costs, t: int, rows: int, columns: int, *, down: bool = False
    ) -> Held:
        """Takes what the product needs meanwhile; its output, ``(t, rows)``, stays.

        :param down: it follows the activation function.
        """
        if self.tier == "4bit":
            return self._nf4(a, costs, t, rows, columns)
        if self.tier == "8bit":
            return self._int8(a, costs, t, rows, columns, down=down)
        return a.take(t * rows * self.size)

    def _nf4(self, a: Allocator, costs: Costs, t: int, rows: int, columns: int) -> Held:
        """``_dequant_linear_fallback``: the weight in 16 bit, then a plain product."""
        if t <= costs.dequantise_above_tokens:
            return a.take(t * rows * self.size)
        weight = a.take(rows * columns * self.size)
        result = a.take(t * rows * self.size)
        a.drop(weight)
        return result

    def _int8(
        self, a: Allocator, costs: Costs, t: int, rows: int, columns: int, *, down: bool
    ) -> Held:
        """``MatMul8bitLt``: fp16 copy and outlier mask of the input, its int8 form, the int32
        product, its fp16 form, the result; outlier columns multiplied in 16 bit."""
        half = a.take(t * columns * 2) if self.cast_to_half else None
        quantised = a.take(t * columns)
        magnitude = a.take(t * columns * 2)
        mask = a.take(t * columns)
        a.drop(magnitude)
        a.drop(mask)
        if half is not None:
            a.drop(half)
        share = costs.int8_outlier_share_down if down else costs.int8_outlier_share
        outliers: list[Held] = []
        kept = int(columns * share)
        if kept:
            outliers = [a.take(t * kept * self.size)]
            wide = a.take(rows * kept * 4)
            outliers.append(a.take(rows * kept * self.size))
            a.drop(wide)
        product = a.take(t * rows * 4)
        result = a.take(t * rows * 2)
        if self.cast_to_half:
            as_half, result = result, a.take(t * rows * self.size)
            a.drop(as_half)
        a.drop(product)
        if outliers:
            without, result = result, a.take(t * rows * self.size)
            a.drop(without)
        for held in outliers:
            a.drop(held)
        a.drop(quantised)
        return result
