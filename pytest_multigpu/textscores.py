"""The fixed text set, scored by a run's probe on its model, with what makes runs comparable.

Knows no pytest and no session.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .records.drift import TextScores

if TYPE_CHECKING:
    from .model.loaded import LoadedModel
    from .probes.probe import Probe

_SCORING = ("torch", "transformers", "accelerate", "bitsandbytes", "pytest-multigpu")
"""Packages whose version may change a bit of a score."""


def text_scores(
    loaded: LoadedModel,
    probe: Probe,
    *,
    room_tokens: int,
    checkpoint: Path | None,
    gpus: Sequence[str],
    versions: Mapping[str, str],
) -> TextScores:
    """
    :param room_tokens: no forward is larger, padding included.
    :param checkpoint: where the weights are from, if they are from a checkpoint.
    :param gpus: names of the GPUs that CUDA sees, in its order.
    :param versions: installed versions by package.
    :raises MultiGpuError: a score that could not be had.
    """
    from .probes.drift import score_texts
    from .probes.textset import MAX_TOKENS, text_set

    room = min(MAX_TOKENS, room_tokens)
    values, tokens = score_texts(loaded.model, loaded.tokenizer, probe, max_tokens=room)
    architecture = loaded.architecture
    return TextScores(
        model=architecture.model,
        weights=_weights_id(loaded.load.weights, checkpoint),
        probe=probe.digest,
        texts=text_set(),
        tokens=tokens,
        tier=architecture.tier,
        dtype=architecture.dtype,
        gpus=tuple(gpus[index] for index in loaded.cuda_devices),
        versions={name: found for name, found in versions.items() if name in _SCORING},
        when=time.time(),
        values=values,
    )


def _weights_id(kind: str, checkpoint: Path | None) -> str:
    """Synthesised ones are the same for the same model, seeded by each tensor's name."""
    from .model.fingerprint import fingerprint

    if kind != "checkpoint" or checkpoint is None:
        return kind
    return f"checkpoint {fingerprint(checkpoint)}"
