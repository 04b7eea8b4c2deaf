"""The model's bytes block by block, and where a plan puts them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Literal

from .passes import Passes
from .tiers import TIERS as TIERS
from .tiers import Tier as Tier

WeightsSource = Literal["synthetic", "checkpoint"]
BlockKind = Literal["embedding", "layer", "norm", "head", "other"]


@dataclass(frozen=True, kw_only=True)
class Block:
    """A module that stays whole on one device: the unit of a device map."""

    name: str
    """Module path, ``model.layers.0``."""
    kind: BlockKind
    layer: int | None = None
    """Index among the decoder layers, for ``kind == "layer"``."""
    parameters: int = 0
    weights_bytes: int = 0
    """In memory once loaded at the architecture's tier: quantised data, its statistics
    (absmax, SCB), what stays 16-bit, and persistent or plain buffers."""
    load_transient_bytes: int = 0
    """Largest 16-bit tensor of this block that is on its GPU while it is quantised; 0 in 16 bit."""
    quantised_parameters: int = 0
    """Of ``parameters``: what is quantised; 0 in 16 bit."""
    unquantised_bytes: int = 0
    """Of ``weights_bytes``: a layer's matrices that 8 or 4 bit leaves in 16."""
    routed_bytes: int = 0
    """Of ``weights_bytes``: experts that a router chooses among, in one tensor."""
    routed_share: float = 1.0
    """Of them, what one token goes through."""
    kv_bytes_per_token: int = 0
    """KV cache of one token of one sequence, at the model's dtype."""
    kv_window: int | None = None
    """Tokens the cache keeps at most (sliding window); None if it grows with the context."""
    tied_to: str | None = None
    """The block whose weights this one shares; its own ``weights_bytes`` is then 0."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A causal LM in one tier and dtype. ``blocks`` are in forward order and cover it all."""

    model: str
    """Preset name, path or hub id, as the user gave it."""
    model_class: str
    """``LlamaForCausalLM``."""
    tier: Tier
    dtype: str
    """Of what is not quantised, and of activations: ``bfloat16``, ``float16``, ``float32``."""
    blocks: tuple[Block, ...]
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_context: int | None = None
    """``max_position_embeddings``."""
    attention: str = "sdpa"
    """What transformers runs it with: ``sdpa``; ``eager`` where the model has no other, with score
    matrices of tokens x tokens; ``none`` without a KV cache."""
    repeats_kv_to_decode: bool = True
    """Whether masked attention repeats K and V for all query heads at one new token too."""
    passes: Passes | None = None
    """What its layers take, as the installed transformers runs them; None: as Llama's."""
    unknown: tuple[str, ...] = ()
    """What the plan cannot account for, a sentence each; empty for plain decoders."""
    refused: tuple[str, ...] = ()
    """Why no GPU can run it in this tier, a sentence each."""

    @property
    def parameters(self) -> int:
        return sum(block.parameters for block in self.blocks)

    @property
    def weights_bytes(self) -> int:
        return sum(block.weights_bytes for block in self.blocks)

    @property
    def unquantised_bytes(self) -> int:
        """Of the weights: matrices in the layers that 8 or 4 bit leaves in 16. transformers'
        bitsandbytes integration replaces plain Linears only, so neither experts that are one tensor
        nor Linears of a class of their own (Falcon's)."""
        return sum(block.unquantised_bytes for block in self.blocks)


DeviceMap = Mapping[str, "int | str"]
"""Module path to CUDA index, ``cpu`` or ``disk``, as ``from_pretrained(device_map=)`` takes it."""

MaxMemory = Mapping[int, "str | int"]
"""CUDA index to ``36GiB``, or bytes, as ``from_pretrained(max_memory=)`` takes it."""


def auto_call(max_memory: MaxMemory) -> str:
    """``from_pretrained(..., device_map="auto", max_memory={0: "36GiB", 1: "34GiB"})``."""
    caps = ", ".join(f"{gpu}: {json.dumps(cap)}" for gpu, cap in max_memory.items())
    return f'from_pretrained(..., device_map="auto", max_memory={{{caps}}})'


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """Predicted bytes in use on one GPU as NVML shows them, at the worst moment of each phase."""

    load_bytes: int = 0
    prefill_bytes: int = 0
    decode_bytes: int = 0
    probe_bytes: int = 0

    @property
    def worst_bytes(self) -> int:
        return max(self.load_bytes, self.prefill_bytes, self.decode_bytes, self.probe_bytes)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What one GPU holds when a phase has most in tensors, and what the allocator has beside.

    Bytes; they sum to the phase's peak.
    """

    context_bytes: int = 0
    """The CUDA context and, once the model ran, kernels: all outside torch's allocator."""
    weights_bytes: int = 0
    """With quantisation statistics."""
    kv_bytes: int = 0
    activations_bytes: int = 0
    logits_bytes: int = 0
    workspace_bytes: int = 0
    """cuBLAS's, from torch's allocator."""
    transient_bytes: int = 0
    """16-bit tensors that are there to be quantised while loading."""
    slack_bytes: int = 0
    """Reserved by the allocator and not in use then: fragments, and what earlier was more."""

    @property
    def total_bytes(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def own_bytes(self) -> int:
        """What does not get less where more GPUs share the layers. Slack does."""
        return self.total_bytes - self.weights_bytes - self.kv_bytes - self.slack_bytes


@dataclass(frozen=True, kw_only=True)
class DevicePlan:
    """What a plan puts on one device. All sizes are bytes."""

    device: str
    """``cuda:0`` (CUDA index), ``cpu`` or ``disk``."""
    layers: tuple[int, int] | None
    """First and last decoder layer, inclusive; None if it holds none."""
    weights_bytes: int
    kv_bytes: int
    activation_bytes: int
    """The largest of what prefill, decode and probe hold at once beyond weights and KV."""
    reserve_bytes: int
    """CUDA context, workspaces and allocator slack."""
    peak_bytes: int
    """Predicted bytes in use as NVML shows them at the worst moment of the session."""
    limit_bytes: int
    """What this process may use: free bytes as found. 0 for ``cpu`` and ``disk``: unlimited."""
    peaks: Peaks = field(default_factory=Peaks)
    parts: Mapping[str, Parts] = field(default_factory=dict)
    """``load``, ``prefill``, ``decode`` and ``probe`` to the parts of that peak; GPUs only."""


@dataclass(frozen=True, kw_only=True)
class LongestContext:
    """How long a context one tier and placement have room for on the machine."""

    tier: Tier
    placement: Literal["auto", "balanced"]
    tokens: int
    """Of each sequence of the batch; 0 if the model does not fit at all."""
    expandable_segments: bool = False
    """With them, where the environment has not set them: what they would add."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Where everything goes and what it takes, per device."""

    architecture: Architecture
    weights: WeightsSource
    placement: str
    """``auto``, ``balanced`` or the device-map file's path."""
    context_tokens: int
    batch: int
    fits: bool
    reasons: tuple[str, ...] = ()
    """Why it does not fit, the worst first: which GPU lacks how much, what spilled where."""
    mendable: bool = False
    """It does not fit, but another placement or expandable segments would, or no machine: nothing
    is to be rented."""
    remedies: tuple[str, ...] = ()
    """What to rent or change so that it fits."""
    warnings: tuple[str, ...] = ()
    """It fits, and yet something should be known: that a better tier would fit as well."""
    devices: tuple[DevicePlan, ...] = ()
    device_map: DeviceMap = field(default_factory=dict)
    offloaded: tuple[str, ...] = ()
    """Blocks on cpu or disk, in forward order."""
    max_memory: MaxMemory | None = None
    """With it plain ``device_map="auto"`` gives the balanced placement. None if there is none, or
    if this plan is neither that placement nor one that it would mend."""
    longest: tuple[LongestContext, ...] = ()
    """Of every tier and placement, where they were asked for: ``--gpu-plan -v``."""

    @property
    def weights_bytes(self) -> int:
        """Of the whole model, wherever it is."""
        return self.architecture.weights_bytes
