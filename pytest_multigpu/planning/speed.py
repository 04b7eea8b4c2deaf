"""How long one decode step should take with transformers' ``generate``. Imports records.

A step takes the longer of reading all weights at ``EFFICIENCY`` of the memory bandwidth and of what
Python and the kernel launches need for each layer: at batch 1 the GPUs wait for the CPU. That
part is measured (``MS_PER_LAYER``) on the machine named there, and scales with how long a launch
takes: ``REFERENCE_LAUNCH_SECONDS`` there, measured anew where a model runs.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..records.plan import Tier

EFFICIENCY = 0.8
MS_PER_LAYER: Mapping[Tier, float] = {"16bit": 1.25, "8bit": 6.9, "4bit": 1.37, "cpu": 1.25}
"""Several H100s, torch 2.11, transformers 5.17, bitsandbytes 0.50.2."""
ONE_GPU_SHARE = 0.8
"""One GPU needs no dispatch hooks: 12.4 against 10.0 tokens/s in 16 bit."""
REFERENCE_LAUNCH_SECONDS = 6e-6
"""Of one elementwise kernel from Python, where ``MS_PER_LAYER`` was measured."""


def step_seconds(
    read_seconds: float,
    *,
    layers: int,
    tier: Tier,
    gpus: int,
    launch_seconds: float = REFERENCE_LAUNCH_SECONDS,
) -> float:
    """Expected seconds of one decode step of one sequence; an estimate.

    :param read_seconds: reading every weight once at the full memory bandwidth.
    :param launch_seconds: of one elementwise kernel from Python on that machine.
    """
    share = ONE_GPU_SHARE if gpus == 1 else 1.0
    slower = launch_seconds / REFERENCE_LAUNCH_SECONDS
    return max(read_seconds / EFFICIENCY, layers * MS_PER_LAYER[tier] / 1e3 * share * slower)
