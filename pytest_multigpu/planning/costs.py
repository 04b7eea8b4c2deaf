"""Measured constants behind the predicted peaks, with the hardware and versions they come from.

Everything that follows from shapes is a formula in :mod:`.forward`; here is what only a
measurement can tell. ``benchmarks/peaks.py`` measures them and compares the predictions; a new
measurement is a new row in ``MEASURED``. Imports records, units and :mod:`.nf4`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..records.plan import Tier
from ..units import MIB
from .nf4 import direct_tokens

SPARE_SHARE = 1 / 256
"""Of a GPU's free bytes, kept spare where a plan is said to fit: how far a prediction may be off.
On one H200 (559 MiB of it) a 16-bit 70B with 12,288 tokens, predicted to fit to the last byte, ran
out of memory for want of 207 MiB; on one H100 in 8 bit, 13,984 tokens left 315 MiB more than
predicted."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Bytes and thresholds that a plan adds to the shapes. One row a kind of GPU."""

    hardware: str
    versions: str
    context_bytes: int
    """NVML ``used`` of one process after ``import torch`` and a first kernel on that GPU."""
    module_bytes: int
    """More of the same once generation ran: cuBLAS, attention and quantisation kernels loaded."""
    int8_module_bytes: int = 0
    """And more where the Linears are int8."""
    workspace_bytes: int
    """cuBLAS workspace that torch takes from its allocator at the first matrix product
    (``at::cuda::getChosenWorkspaceSize``: 32 MiB from compute capability 9.0, else 8.125 MiB)."""
    dequantise_above_tokens: int | None
    """bitsandbytes multiplies nf4 weights directly up to that many tokens; above, it first
    dequantises the whole Linear to 16 bit. None: by shape, as on Hopper (:mod:`.nf4`). Cards with
    slower memory dequantise later."""
    mask_copy: int = 1
    """Copies in the model's dtype that an attention kernel makes of a padding mask, which is one
    byte for each query and key: the additive mask that every kernel takes
    (``convert_boolean_attn_mask`` in ``transformer/attention.cpp``)."""
    mask_copy_unaligned: int = 1
    """More of them where the number of keys is no multiple of 8, which the memory-efficient kernel
    needs (``pad_bias``). It is the one that takes masks where cuDNN is not preferred."""
    attention_statistics: bool = True
    """Whether the attention kernel writes its log-sum-exp: cuDNN's does so for training only."""
    int8_outlier_search_bytes: int = 33 * MIB
    """What ``Tensor.any`` takes for a moment where LLM.int8 looks for the columns with outliers."""
    int8_outliers: float = 0.0
    """Share of the columns into a hidden-size Linear that LLM.int8 keeps in 16 bit. Synthesised
    Llamas have none: :mod:`..model.half_norms`."""
    int8_outliers_from: int = 0
    """The first layer with those columns."""
    int8_outliers_attended: float = 0.005
    """The same for the Linear after attention: of the synthesised 70B's 8192 columns, at 2,048
    tokens, 20 to 60 in most layers and up to 570 in the first ones; at 65,000 tokens 160 to 400 and
    up to 2,229. Replays with the columns found end at the same peaks. Trained models have some."""
    int8_outliers_down: float = 0.0
    """The same for the Linear after the activation function."""
    expandable_segments: bool = False
    """Whether torch's allocator grows its segments. Not the GPU's but the process's:
    ``PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True``."""

    def dequantises(self, tokens: int, rows: int, columns: int) -> bool:
        """Whether that many tokens x sequences have an nf4 weight of that shape in 16 bit first."""
        most = self.dequantise_above_tokens
        return tokens > (direct_tokens(rows, columns) if most is None else most)

    def outliers_in(self, layer: int | None) -> float:
        """:attr:`int8_outliers` of a layer."""
        return 0.0 if layer is None or layer < self.int8_outliers_from else self.int8_outliers

    def as_trained(self, first: int) -> Costs:
        """The same where a trained model's outliers begin in layer ``first``."""
        return replace(self, int8_outliers=TRAINED_OUTLIERS, int8_outliers_from=first)

    def in_tier(self, tier: Tier) -> Costs:
        """The same with all the kernels that this tier loads."""
        if tier != "8bit":
            return self
        return replace(
            self, module_bytes=self.module_bytes + self.int8_module_bytes, int8_module_bytes=0
        )


TRAINED_OUTLIERS = 7 / 8192
"""Share of the hidden features that are outliers in some text: seven at most in the models of up to
13 billion parameters that Dettmers et al. 2022 (LLM.int8(), arXiv:2208.07339) looked at, in all
layers from 6.7 billion on."""
OUTLIERS_FROM = (0, 1, 2, 4)
"""Layers in which they may begin. What a GPU's first layers leave in torch's cache decides what the
later ones find there: by one tensor of the intermediate size more or less."""

HOPPER = Costs(
    hardware="NVIDIA H100 80GB HBM3 and H200",
    versions="torch 2.11, transformers 5.17, bitsandbytes 0.50.2, driver 580.159.04",
    # 618 to 620 MiB on each of five machines; generated: 694 to 702 in all, in 8 bit 758 to 768.
    context_bytes=620 * MIB,
    module_bytes=80 * MIB,
    int8_module_bytes=66 * MIB,
    workspace_bytes=32 * MIB,
    dequantise_above_tokens=None,
    # torch prefers cuDNN's attention there, which takes masks of any length: 4 x 40,210 tokens in
    # nf4 ran out of memory on four H100s where a replay without further copies does.
    mask_copy_unaligned=0,
    attention_statistics=False,
)
OTHER = Costs(
    hardware="any other GPU, not measured: Hopper's figures, the older cuBLAS workspace",
    versions=HOPPER.versions,
    context_bytes=620 * MIB,
    module_bytes=80 * MIB,
    int8_module_bytes=66 * MIB,
    workspace_bytes=8320 * 1024,
    dequantise_above_tokens=16,
)
CPU = Costs(
    hardware="CPU",
    versions="",
    context_bytes=0,
    module_bytes=0,
    workspace_bytes=0,
    dequantise_above_tokens=0,
)

MEASURED: tuple[tuple[tuple[int, int], Costs], ...] = (((9, 0), HOPPER),)
"""By compute capability."""


def costs_for(capability: tuple[int, int] | None, *, expandable_segments: bool = False) -> Costs:
    """The measured row of that compute capability, or the stand-in for unmeasured GPUs."""
    found = next((costs for known, costs in MEASURED if capability == known), OTHER)
    return replace(found, expandable_segments=True) if expandable_segments else found
