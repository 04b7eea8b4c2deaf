"""How long one decode step should take with transformers' ``generate``.

A step takes the longer of two times. One is that of the memory, at ``EFFICIENCY`` of its bandwidth:
weights and KV cache are read once. The other is that of Python and the kernel launches: at batch 1
the GPUs wait for the CPU. It goes by what the layers launch, measured by
``benchmarks/decode_cost.py``, and scales with how long a launch takes there: it is measured where a
model runs. Imports records and siblings.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..records.plan import Architecture, Tier
from .replay import kv_bytes

EFFICIENCY = 0.8
"""In 16 bit one H200 moved 3.0 to 3.6 of its 4.8 TB/s while its kernels ran."""
REFERENCE_LAUNCH_SECONDS = 7.5e-6
"""Of one elementwise kernel from Python, which the times below are for; rented machines took 6 to
13 us."""
US_PER_KERNEL = 25.0
"""Of a layer, the Python of the modules that call it included."""
US_PER_LINEAR: Mapping[Tier, float] = {"16bit": 0.0, "8bit": 460.0, "4bit": 11.0, "cpu": 0.0}
"""What a quantised Linear takes beyond that. LLM.int8 launches dozens of kernels and waits for the
GPU where it finds outliers: less with synthesised weights, more with many of them."""
MS_BESIDE = 3.3
"""A step of ``generate`` beside the layers: embeddings, positions, head, the choice of a token."""
SEVERAL_GPUS = 1.3
"""Times as long with dispatch hooks."""
LLAMA_KERNELS = 40
LLAMA_LINEARS = 7
"""Of one layer; a recording of the installed transformers agrees."""


def step_seconds(
    architecture: Architecture,
    memory_seconds: float,
    *,
    gpus: int,
    launch_seconds: float = REFERENCE_LAUNCH_SECONDS,
) -> float:
    """Expected seconds of one decode step of one sequence; an estimate.

    :param memory_seconds: moving :func:`step_bytes`, copies included, at the full bandwidth.
    :param launch_seconds: of one elementwise kernel from Python on that machine.
    """
    kernels, linears = launched(architecture)
    python = MS_BESIDE / 1e3
    python += (kernels * US_PER_KERNEL + linears * US_PER_LINEAR[architecture.tier]) / 1e6
    python *= launch_seconds / REFERENCE_LAUNCH_SECONDS * (SEVERAL_GPUS if gpus > 1 else 1.0)
    return max(memory_seconds / EFFICIENCY, python)


def launched(architecture: Architecture) -> tuple[int, int]:
    """Kernels and quantised Linears of all layers in a decode step of one sequence."""
    passes = architecture.passes
    if passes is None:
        return architecture.layers * LLAMA_KERNELS, architecture.layers * LLAMA_LINEARS
    kinds = passes.find("decode", batch=1, tokens=1).layers
    linears = [sum(step.op == "linear" for step in kind.steps) for kind in kinds]
    return (
        sum(kinds[kind].kernels for kind in passes.kinds),
        sum(linears[kind] for kind in passes.kinds),
    )


def step_bytes(
    architecture: Architecture, *, context_tokens: int = 0, batch: int = 1, copies: bool = False
) -> dict[str, int]:
    """What one decode step reads of each block, at least: of an embedding table next to nothing,
    of routed experts those that the tokens go through, of all else everything.

    :param context_tokens: in the cache of each sequence.
    :param copies: with what transformers moves beside: for each token it gathers the weights of
        its experts (``batched_mm_experts_forward``), which are written and read once more.
    """
    tied = {block.tied_to for block in architecture.blocks}
    found = {}
    for block in architecture.blocks:
        if block.kind == "embedding" and block.name not in tied:
            found[block.name] = 0
            continue
        routed = block.routed_bytes * block.routed_share * batch
        moved = block.weights_bytes - block.routed_bytes + min(block.routed_bytes, int(routed))
        moved += kv_bytes(block, context_tokens, batch)
        if copies and block.routed_share < 1:  # 1: nothing is known of a router
            moved += int(2 * routed)
        found[block.name] = moved
    return found
