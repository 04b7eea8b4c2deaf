"""Memory bandwidth of known cards by their datasheets: what a quick run holds a card to, and what
the speeds of cards to rent are estimated from. Pure data; imports nothing of this package.
"""

from __future__ import annotations

from collections.abc import Mapping

MEMORY_GB_PER_S: Mapping[str, float] = {
    "A10": 600,
    "A100 80GB PCIe": 1935,
    "A100-PCIE-40GB": 1555,
    "A100-SXM4-40GB": 1555,
    "A100-SXM4-80GB": 2039,
    "A10G": 600,
    "A40": 696,
    "B200": 7700,
    "GH200 480GB": 4000,
    "GeForce RTX 3090": 936,
    "GeForce RTX 4090": 1008,
    "GeForce RTX 5090": 1792,
    "H100 80GB HBM3": 3352,
    "H100 NVL": 3938,
    "H100 PCIe": 2039,
    "H200": 4800,
    "H200 NVL": 4800,
    "L4": 300,
    "L40": 864,
    "L40S": 864,
    "RTX 5000 Ada Generation": 576,
    "RTX 6000 Ada Generation": 960,
    "RTX A5000": 768,
    "RTX A6000": 768,
    "RTX PRO 6000 Blackwell Server Edition": 1792,
    "Tesla T4": 320,
    "Tesla V100-SXM2-32GB": 900,
}
"""GB/s (10**9 bytes) by the name that NVML and CUDA show, less ``NVIDIA``."""


def memory_gb_per_s(name: str) -> float | None:
    """The datasheet's figure; None for a card that is not in the table.

    Only whole names match: a name that merely begins alike may be another card.
    """
    return MEMORY_GB_PER_S.get(name.removeprefix("NVIDIA ").strip())
