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
        self, a: Allocator, costs: Costs, t: int, rows: int, columns: int, *, outliers: float = 0.0
    ) -> Held:
        """Takes what the product needs meanwhile; its output, ``(t, rows)``, stays.

        :param outliers: share of the columns that LLM.int8 multiplies in 16 bit.
        """
        if self.tier == "4bit":
            return self._nf4(a, costs, t, rows, columns)
        if self.tier == "8bit":
            return self._int8(a, costs, t, rows, columns, int(columns * outliers))
        return a.take(t * rows * self.size)

    def _nf4(self, a: Allocator, costs: Costs, t: int, rows: int, columns: int) -> Held:
        """``_dequant_linear_fallback``: the weight in 16 bit, then a plain product."""
        if not costs.dequantises(t, rows, columns):
            return a.take(t * rows * self.size)
        weight = a.take(rows * columns * self.size)
        result = a.take(t * rows * self.size)
        a.drop(weight)
        return result

    def _int8(self, a: Allocator, costs: Costs, t: int, rows: int, columns: int, kept: int) -> Held:
        """``MatMul8bitLt``: fp16 copy and outlier mask of the input, its int8 form, the int32
        product, its fp16 form, the result; ``kept`` outlier columns multiplied in 16 bit."""
        half = a.take(t * columns * 2) if self.cast_to_half else None
        quantised = a.take(t * columns)
        magnitude = a.take(t * columns * 2)
        mask = a.take(t * columns)
        a.drop(magnitude)
        if kept:
            a.drop(a.take(costs.int8_outlier_search_bytes))
        a.drop(mask)
        if half is not None:
            a.drop(half)
        if not kept:
            result = self._int8_product(a, t, rows)
            a.drop(quantised)
            return result
        inputs = a.take(t * kept * self.size)
        weight = self._outlier_weight(a, rows * kept)
        without = self._int8_product(a, t, rows)
        result = a.take(t * rows * self.size)
        for held in (without, weight, quantised, inputs):
            a.drop(held)
        return result

    def _int8_product(self, a: Allocator, t: int, rows: int) -> Held:
        """``int8_scaled_mm``."""
        product = a.take(t * rows * 4)
        result = a.take(t * rows * 2)
        if self.cast_to_half:
            as_half, result = result, a.take(t * rows * self.size)
            a.drop(as_half)
        a.drop(product)
        return result

    def _outlier_weight(self, a: Allocator, elements: int) -> Held:
        """``int8_vectorwise_dequant`` of the weight's outlier columns."""
        stored = a.take(elements)
        wide = [a.take(elements * 4) for _ in range(2)]
        a.drop(wide[0])
        a.drop(stored)
        result = a.take(elements * self.size)
        a.drop(wide[1])
        return result
