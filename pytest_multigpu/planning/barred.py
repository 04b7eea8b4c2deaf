"""What no amount of memory mends: numbers that a GPU does not compute with, positions that a
model does not have. Imports records.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..records.machine import Gpu
from ..records.plan import Architecture

_Capability = tuple[int, int]

BFLOAT16: _Capability = (8, 0)
"""From Ampere on in hardware (CUDA C++ Programming Guide, "Arithmetic Instructions")."""
QUANTISED: Mapping[str, tuple[str, _Capability]] = {
    "8bit": ("LLM.int8", (7, 5)),
    "4bit": ("nf4", (6, 0)),
}
"""Tier to method and what it needs: bitsandbytes 0.50's installation guide, "NVIDIA CUDA"."""


def needed(architecture: Architecture) -> tuple[tuple[str, _Capability], ...]:
    """What a model computes with on GPUs, and the compute capability that each needs."""
    if architecture.tier == "cpu":
        return ()
    found = []
    if architecture.dtype == "bfloat16":
        found.append(("bfloat16", BFLOAT16))
    if architecture.tier in QUANTISED:
        found.append(QUANTISED[architecture.tier])
    return tuple(found)


def runs_on(capability: _Capability | None, architecture: Architecture) -> bool:
    """Whether a GPU can compute in that tier and dtype; an unknown one is let through."""
    if architecture.refused:
        return False
    return capability is None or all(capability >= least for _, least in needed(architecture))


def why_barred(
    architecture: Architecture, cards: Mapping[int, Gpu], context_tokens: int
) -> tuple[str, ...]:
    """A sentence for what no GPU can run, for each kind of number that some GPU lacks, and for too
    long a context.

    :param cards: the GPUs that the plan uses, by CUDA index.
    """
    found = list(architecture.refused)
    for what, least in needed(architecture):
        lacking = [
            f"GPU {index} ({gpu.name}) has {_shown(gpu.capability)}"
            for index, gpu in sorted(cards.items())
            if gpu.capability is not None and gpu.capability < least
        ]
        if lacking:
            more = f" and {len(lacking) - 4} more" if lacking[4:] else ""
            found.append(
                f"{what} needs compute capability {_shown(least)} or newer; "
                f"{', '.join(lacking[:4])}{more}"
            )
    if beyond_positions(architecture, context_tokens):
        found.append(
            f"{architecture.model} has {architecture.max_context} positions "
            f"(max_position_embeddings); {context_tokens} tokens were asked for"
        )
    return tuple(found)


def beyond_positions(architecture: Architecture, context_tokens: int) -> bool:
    """Whether a context has more tokens than the model has positions."""
    most = architecture.max_context
    return most is not None and context_tokens > most


def _shown(capability: _Capability) -> str:
    return f"{capability[0]}.{capability[1]}"
