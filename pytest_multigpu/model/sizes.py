"""What a parameter takes once it is loaded: quantised, with its statistics, or as it is.

torch and transformers are imported inside the functions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

NF4_CODE_BYTES = 16 * 4
"""bitsandbytes keeps the 16 fp32 values of nf4 beside every quantised weight."""
NESTED_BYTES = 256 * 4 + 4
"""Double quantisation adds its own 256 fp32 values and one fp32 offset to every weight."""
NESTED_BLOCK = 256
"""absmax values that share one second-level absmax (bitsandbytes quantize_4bit)."""


@dataclass(frozen=True)
class Size:
    in_memory: int
    transient: int = 0


class Sizer:
    """Bytes of a parameter once loaded, following transformers' and bitsandbytes' own rules."""

    def __init__(self, model: Any, dtype: str) -> None:
        import torch

        self._modules = dict(model.named_modules())
        plan = model._get_dtype_plan(getattr(torch, dtype))
        self._match: Any = None
        if plan:
            from transformers.core_model_loading import build_glob_alternation

            alternation, by_group, _ = build_glob_alternation(list(plan))
            self._match = lambda name: (
                plan[by_group[found.lastgroup]] if (found := alternation.search(name)) else None
            )

    def size(self, name: str, parameter: Any) -> Size:
        count = int(parameter.numel())
        module_name, _, leaf = name.rpartition(".")
        module = self._modules[module_name]
        quantised = type(module).__name__ if leaf == "weight" else ""
        if quantised == "Linear8bitLt":
            # LLM.int8: one byte a weight, and SCB, the fp32 maximum of each output row.
            return Size(count + 4 * module.out_features, count * parameter.element_size())
        if quantised == "Linear4bit":
            return Size(_bytes_4bit(count, parameter), count * parameter.element_size())
        kept = self._match(name) if self._match is not None else None
        itemsize = kept.itemsize if kept is not None else parameter.element_size()
        return Size(count * itemsize)


def _bytes_4bit(count: int, parameter: Any) -> int:
    """Packed weights, absmax and lookup tables of one Linear (bitsandbytes quantize_4bit)."""
    packed = -(-count // 2)
    absmax = -(-count // int(parameter.blocksize))
    if parameter.compress_statistics:
        return packed + absmax + 4 * -(-absmax // NESTED_BLOCK) + NESTED_BYTES + NF4_CODE_BYTES
    return packed + 4 * absmax + NF4_CODE_BYTES
