"""Every limit that the interconnect and arithmetic checks apply, in one place. Imports nothing.

A sibling is a GPU of the same model on the same machine, or a pair with the same link. In twenty
runs on four sound H100s (results/h100x4-quick-runs.json) the slowest had at least 0.94 of the
fastest in products, 0.90 in memory, 0.93 between the GPUs and 0.94 from the host; on a shared host
(results/h100x2-quick-runs.md) 0.83 between them and, in somebody else's burst, 0.42 from the host.
"""

from __future__ import annotations

from typing import Final

SLOW_SIBLING: Final = 0.8
"""Memory and product speed: below this share of the siblings' median a GPU fails."""
SLOW_HOST_SIBLING: Final = 0.4
"""Host to GPU: GPUs on the far socket are honestly slower, and half the lanes give half of it,
which the PCIe link's own record warns of. A quarter of the lanes fails."""
SLOW_PAIR_SIBLING: Final = 0.5
"""Pair bandwidth: below this share of the median of pairs with the same link."""
LEAST_OF_DATASHEET: Final = 0.6
"""Memory speed against the card's datasheet; a healthy H100 reaches 0.9."""
LEAST_HOST_GB_PER_S: Final = 1.0
"""Host to GPU: slower than PCIe 3.0 with two lanes."""
LEAST_PAIR_GB_PER_S: Final = 1.0
RELATIVE_ERROR: Final = {"bfloat16": 0.02, "float32": 2e-5}
"""Largest error against float64: bf16 rounds at 2**-9, fp32 sums at about 1e-6; TF32 would
show as 1e-4 and more."""
