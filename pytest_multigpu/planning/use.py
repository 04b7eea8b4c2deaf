"""What NVML would show of one GPU, phase by phase and part by part, from what its replay came to.

Imports records and its own part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..records.plan import Architecture, Block, Parts, Peaks, WeightsSource
from .costs import Costs
from .known import Moment, Outcome
from .load import scratch_sizes


@dataclass(frozen=True, kw_only=True)
class Use:
    """One GPU after a replay. Bytes."""

    parts: Mapping[str, Parts]
    """Phase to what is in use, as NVML shows it. Without ``probe`` if that was not replayed."""
    allocated_peak_bytes: int
    """In tensors, at the worst moment after loading."""
    fixed_bytes: int
    """Outside torch's allocator, plus the cuBLAS workspace."""
    missing_bytes: int
    """With a limit: what the driver lacked when it ran out; 0 if it did not."""
    least_bytes: int
    """About the fewest free bytes with which this GPU would do."""

    @property
    def peaks(self) -> Peaks:
        return Peaks(**{f"{phase}_bytes": parts.total_bytes for phase, parts in self.parts.items()})

    @property
    def activation_bytes(self) -> int:
        """The most that a phase holds at once beyond weights and KV; workspaces not counted."""
        return max(parts.activations_bytes + parts.logits_bytes for parts in self.parts.values())


def outside(costs: Costs) -> int:
    """Bytes that a process which has generated holds outside torch's allocator."""
    return costs.context_bytes + costs.module_bytes


def use_of(
    architecture: Architecture,
    blocks: Sequence[Block],
    costs: Costs,
    weights: WeightsSource,
    generated: Outcome,
    probed: Outcome | None,
) -> Use:
    """
    :param blocks: whose weights are on that GPU.
    :param probed: None if no probe was replayed.
    """
    outcomes = (generated, probed or generated)
    moments = {phase: at for outcome in outcomes for phase, at in outcome.moments.items()}
    held = sum(block.weights_bytes for block in blocks)
    transient = sum(scratch_sizes(architecture, blocks, weights))
    loading = moments.pop("load")
    parts = {
        "load": Parts(
            context_bytes=costs.context_bytes,
            weights_bytes=held,
            transient_bytes=transient,
            slack_bytes=loading.reserved - held - transient,
        )
    }
    for phase, moment in moments.items():
        parts[phase] = _parts(costs, held, moment, generated.loaded_bytes)
    return Use(
        parts=parts,
        allocated_peak_bytes=max(moment.allocated for moment in moments.values()),
        fixed_bytes=outside(costs) + costs.workspace_bytes,
        least_bytes=max(
            generated.load_least + costs.context_bytes,
            *(outcome.least_limit + outside(costs) for outcome in outcomes),
        ),
        missing_bytes=outcomes[1].missing_bytes or generated.missing_bytes,
    )


def _parts(costs: Costs, weights: int, moment: Moment, loaded: int) -> Parts:
    """
    :param weights: bytes.
    :param loaded: bytes in tensors when the model had been loaded.
    """
    used = moment.allocated - loaded - costs.workspace_bytes
    return Parts(
        context_bytes=outside(costs),
        weights_bytes=weights,
        kv_bytes=moment.kv,
        activations_bytes=used - moment.kv - moment.logits,
        logits_bytes=moment.logits,
        workspace_bytes=costs.workspace_bytes,
        slack_bytes=moment.reserved - weights - costs.workspace_bytes - used,
    )
