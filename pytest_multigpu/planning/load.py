"""Loading as a sequence of allocations: one piece for all weights, and what quantising needs.

Follows the package's own loader: on each GPU what it needs for a while, then one piece for
everything above 1 MiB, from which the tensors are cut; at the end what is free goes back to the
driver.
Imports units, records and its own part.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..records.plan import Architecture, Block, WeightsSource
from ..units import MIB
from .gpu import Gpu
from .linears import DTYPE_BYTES

TABLE_VALUES = 8 * 8_388_593
"""Synthesised weights are slices of a table of that many values, which a GPU holds meanwhile
(``PERIOD`` in ``model/synthetic.py``)."""
SLOTS = 2
"""Buffers per GPU that read tensors wait in to be quantised (``SLOTS`` in ``model/reader.py``)."""


def load(
    gpu: Gpu,
    architecture: Architecture,
    blocks: Sequence[Block],
    weights: WeightsSource = "synthetic",
) -> None:
    """Puts the weights of ``blocks`` on one GPU. The allocator's peaks show what it took."""
    a = gpu.allocator
    tensors = [size for block in blocks for size in tensor_sizes(architecture, block)]
    scratch = [a.take(size) for size in scratch_sizes(architecture, blocks, weights)]
    reserve = sum(-(-size // 512) * 512 for size in tensors if size > MIB)
    if reserve:
        a.drop(a.take(reserve))
    for size in tensors:
        a.take(size)
    for held in scratch:
        a.drop(held)
    a.empty_cache()


def scratch_sizes(
    architecture: Architecture, blocks: Sequence[Block], weights: WeightsSource
) -> list[int]:
    """Bytes of what is held while loading and no longer, in the order in which it is taken: the
    table of synthesised weights, buffers as large as the largest 16-bit tensor that is quantised,
    and one more for int8, which is made from float16."""
    if architecture.tier == "cpu":
        return []
    size = DTYPE_BYTES[architecture.dtype]
    largest = max((block.load_transient_bytes for block in blocks), default=0)
    sizes = []
    if weights == "synthetic" and sum(block.parameters for block in blocks) > 2 * TABLE_VALUES:
        sizes.append(TABLE_VALUES * size)
    if largest:
        sizes += [largest] * (1 if weights == "synthetic" else SLOTS)
        if architecture.tier == "8bit" and architecture.dtype != "float16":
            sizes.append(largest * DTYPE_BYTES["float16"] // size)
    return sizes


def tensor_sizes(architecture: Architecture, block: Block) -> list[int]:
    """Bytes of a block's tensors as they stay in memory; they sum to its ``weights_bytes``.

    A layer of Llama's shape tensor by tensor, any other block in as many equal parts as its
    largest tensor suggests.
    """
    if not block.weights_bytes:
        return []
    size = DTYPE_BYTES[architecture.dtype]
    sizes: list[int] = []
    for elements in _linears(architecture, block):
        if architecture.tier == "4bit":
            sizes += [elements // 2, elements // 16]  # nf4, and fp32 absmax per 64 weights
        elif architecture.tier == "8bit":
            sizes.append(elements)
        else:
            sizes.append(elements * size)
    left = block.weights_bytes - sum(sizes)
    if left < 0:  # not quantised the way its size suggests
        return [block.weights_bytes]
    return [*sizes, left] if left else sizes


def _linears(architecture: Architecture, block: Block) -> list[int]:
    """Elements of each Linear of a layer; [] for other blocks."""
    if block.kind != "layer":
        return []
    hidden, inter = architecture.hidden_size, architecture.intermediate_size
    query = architecture.heads * architecture.head_dim
    kv = architecture.kv_heads * architecture.head_dim
    shapes = [hidden * inter] * 3 + [hidden * kv, hidden * query, hidden * query, hidden * kv]
    if 0 <= block.parameters - sum(shapes) <= 16 * (hidden + inter + query):
        return shapes
    largest = block.load_transient_bytes // DTYPE_BYTES[architecture.dtype]
    # Experts in one tensor are no Linears: they stay in 16 bit.
    return [largest] * (block.quantised_parameters // largest) if largest else []
