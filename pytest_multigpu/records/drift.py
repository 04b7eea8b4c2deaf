"""Scores of the fixed text set in one set-up, and how two such sets of scores differ.

Imports the standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

LARGEST, LEAST_RANGE = 1e60, 1e-60
"""Scores beyond these can't be compared: their squares leave what a float holds."""


@dataclass(frozen=True, kw_only=True)
class TextScores:
    """One run's scores, and all that they depend on."""

    model: str
    """As the user named it."""
    weights: str
    """``synthetic``, or ``checkpoint`` and a digest of its files."""
    probe: str
    """Digest of everything in the probe that enters a score."""
    texts: str
    """Name and digest of the text set."""
    tokens: str
    """Digest of the token ids, which are scored and in which batches: another tokenizer or chat
    template shows."""
    tier: str
    dtype: str
    gpus: tuple[str, ...] = ()
    """Name of each GPU that holds weights; empty for a CPU."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of the packages that compute the scores."""
    when: float = 0.0
    """Seconds since the epoch."""
    values: tuple[float, ...] = ()
    """One score a text, in the text set's order."""

    @property
    def subject(self) -> tuple[str, str, str, str, str]:
        """What must be equal for two sets of scores to be comparable."""
        return self.model, self.weights, self.probe, self.texts, self.tokens

    @property
    def differ(self) -> bool:
        """Not all the same, so that one can be told from another."""
        return max(self.values) - min(self.values) > LEAST_RANGE

    @property
    def precision(self) -> str:
        """``8bit``; with the dtype where it is not bfloat16: ``16bit float16``."""
        return self.tier if self.dtype == "bfloat16" else f"{self.tier} {self.dtype}"

    @property
    def gpu_kinds(self) -> frozenset[str]:
        """However many there are: the split over GPUs changes no bit."""
        return frozenset(self.gpus)

    @property
    def setup(self) -> tuple[object, ...]:
        """Scores of one set-up are equal to the bit, and are kept once."""
        versions = tuple(sorted(self.versions.items()))
        return self.subject, self.precision, self.gpu_kinds, versions


@dataclass(frozen=True, kw_only=True)
class DriftReading:
    """Scores of the same texts in two set-ups, in standard deviations of the base's scores."""

    texts: int
    rank_correlation: float
    """Spearman's."""
    shift: float
    """Mean change."""
    spread: float
    """Standard deviation of the changes."""
    scale: float
    """Standard deviation of these scores over the base's."""
    largest: float
    """Largest change of one text, without its sign."""
    equal: bool
    """Equal to the bit."""
