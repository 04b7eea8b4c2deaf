"""Loading as a sequence of allocations: weights, and the 16-bit tensors that are quantised.

Imports records and its own part.
"""

from __future__ import annotations

from ..records.plan import Architecture, Block
from .forward import DTYPE_BYTES, Gpu


def load_block(gpu: Gpu, architecture: Architecture, block: Block) -> None:
    """Puts a block's weights on its GPU the way ``from_pretrained`` does.

    16 bit: the tensors, one by one. Quantised: each Linear's 16-bit tensor comes first, then its
    quantised data and statistics, then the 16-bit tensor goes.
    """
    a = gpu.allocator
    shapes = linear_shapes(architecture, block)
    size = DTYPE_BYTES[architecture.dtype]
    left = block.weights_bytes
    for elements in shapes:
        if architecture.tier in ("16bit", "cpu"):
            a.take(elements * size)
            left -= elements * size
            continue
        copies = gpu.costs.int8_load_copies if architecture.tier == "8bit" else 1
        originals = [a.take(elements * size) for _ in range(copies)]
        packed = elements // 2 if architecture.tier == "4bit" else elements
        a.take(packed)
        left -= packed
        for held in originals:
            a.drop(held)
    if left > 0:
        a.take(left)


def linear_shapes(architecture: Architecture, block: Block) -> list[int]:
    """Elements of each Linear of a Llama-shaped layer, in loading order; [] for other blocks.

    A layer of another shape counts as as many equal parts as its largest tensor suggests.
    """
    if block.kind != "layer":
        return []
    hidden, inter = architecture.hidden_size, architecture.intermediate_size
    query = architecture.heads * architecture.head_dim
    kv = architecture.kv_heads * architecture.head_dim
    shapes = [hidden * inter] * 3 + [hidden * kv, hidden * query, hidden * query, hidden * kv]
    if 0 <= block.parameters - sum(shapes) <= 16 * (hidden + inter + query):
        return shapes
    largest = block.load_transient_bytes // DTYPE_BYTES[architecture.dtype]
    if largest < 1:
        return []
    return [largest] * (block.parameters // largest)
