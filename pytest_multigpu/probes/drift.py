"""How scores of one text set change between tiers on the same weights, or between two runs.

Imports :mod:`.metrics`, errors; numpy inside functions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import ScoringError, UsageError
from .metrics import spearman

MIN_CORRELATION = 0.95
MAX_SHIFT = 0.2
SPREAD = (0.8, 1.25)


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Scores in one tier beside the same texts' in the base tier."""

    base: str
    tier: str
    texts: int
    rank_correlation: float
    """Spearman's."""
    shift: float
    """Mean change, in standard deviations of the base's scores."""
    spread: float
    """Standard deviation of the changes, in the same unit."""
    scale: float
    """Standard deviation of these scores over the base's."""
    advice: str


def drift_between(
    base: str, base_scores: Sequence[float], tier: str, scores: Sequence[float]
) -> Drift:
    """:raises ScoringError: other counts, fewer than three texts, or scores that don't differ."""
    import numpy as np

    a, b = np.asarray(base_scores, np.float64), np.asarray(scores, np.float64)
    if a.shape != b.shape:
        raise ScoringError(f"{tier} has {len(b)} scores, {base} has {len(a)}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ScoringError(f"{tier} or {base} has a score that is not finite")
    correlation = spearman(base_scores, scores)
    deviation = float(a.std())
    shift = float((b - a).mean()) / deviation
    spread, scale = float((b - a).std()) / deviation, float(b.std()) / deviation
    return Drift(
        base=base,
        tier=tier,
        texts=len(a),
        rank_correlation=correlation,
        shift=shift,
        spread=spread,
        scale=scale,
        advice=_advice(base, tier, correlation, shift, scale),
    )


def _advice(base: str, tier: str, correlation: float, shift: float, scale: float) -> str:
    if correlation < MIN_CORRELATION:
        return f"{tier} ranks texts otherwise than {base}: fit the probe again in {tier}"
    if abs(shift) > MAX_SHIFT or not SPREAD[0] <= scale <= SPREAD[1]:
        return f"recalibrate the threshold in {tier}: the ranking holds, the scores move"
    return f"the threshold of {base} holds in {tier}"


def drift_table(scores: Mapping[str, Sequence[float]], base: str) -> list[Drift]:
    """Every other tier beside ``base``.

    :raises ScoringError: ``base`` is not among them.
    """
    if base not in scores:
        raise ScoringError(f"there are no scores of {base} to compare with")
    return [drift_between(base, scores[base], t, s) for t, s in scores.items() if t != base]


def write_drift(
    path: Path, scores: Mapping[str, Sequence[float]], base: str, *, about: Mapping[str, object]
) -> None:
    """Keeps scores and table as JSON, for the report and for a later run to compare with."""
    table = [asdict(row) for row in drift_table(scores, base)]
    content = {
        "schema": 1,
        "about": dict(about),
        "base": base,
        "scores": {tier: list(values) for tier, values in scores.items()},
        "drift": table,
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def compare_with_earlier(path: Path, scores: Mapping[str, Sequence[float]]) -> list[Drift]:
    """This run's scores beside an earlier file's, tier by tier.

    :raises UsageError: not a file of :func:`write_drift`, or of no tier that this run has.
    """
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))["scores"]
        known = {
            tier: [float(value) for value in values]
            for tier, values in earlier.items()
            if tier in scores
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path}: is not a drift file; write one with probe_drift.py") from error
    if not known or not all(math.isfinite(v) for values in known.values() for v in values):
        raise UsageError(f"{path}: has no finite scores of a tier of this run")
    return [
        drift_between(f"earlier {tier}", values, tier, scores[tier])
        for tier, values in known.items()
    ]
