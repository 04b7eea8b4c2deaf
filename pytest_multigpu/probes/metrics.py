"""AUROC with its bootstrap interval, and rank correlation. Pure numpy, imported in functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import ScoringError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Auroc:
    """Area under the ROC curve: how often a positive text scores above a negative one."""

    value: float
    low: float
    high: float
    """2.5 and 97.5 % of the bootstrap."""
    positives: int
    negatives: int


def ranks(values: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 1, ties at their mean."""
    import numpy as np

    array = np.asarray(values, dtype=np.float64)
    _, inverse, counts = np.unique(array, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[inverse], dtype=np.float64)


def _area(positive: Any, negative: Any) -> float:
    import numpy as np

    # Mann-Whitney: rank sum of the positives less its least possible value.
    n = len(positive)
    total = float(ranks(np.concatenate([positive, negative]))[:n].sum())
    return (total - n * (n + 1) / 2) / (n * len(negative))


def auroc(
    scores: Sequence[float], labels: Sequence[bool], *, resamples: int = 1000, seed: int = 0
) -> Auroc:
    """Resampled within each class, so that every resample has both.

    :raises ScoringError: only one class, or a score that is not finite.
    """
    import numpy as np

    values, truth = np.asarray(scores, np.float64), np.asarray(labels, bool)
    if len(values) != len(truth) or not np.isfinite(values).all():
        raise ScoringError("AUROC needs one finite score for each label")
    positive, negative = values[truth], values[~truth]
    if not len(positive) or not len(negative):
        raise ScoringError("AUROC needs texts of both labels")
    rng = np.random.default_rng(seed)
    areas = [
        _area(rng.choice(positive, len(positive)), rng.choice(negative, len(negative)))
        for _ in range(resamples)
    ]
    low, high = np.quantile(areas, [0.025, 0.975])
    return Auroc(
        value=_area(positive, negative),
        low=float(low),
        high=float(high),
        positives=len(positive),
        negatives=len(negative),
    )


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation; ties at their mean rank.

    :raises ScoringError: fewer than three pairs, or one side all equal.
    """
    import numpy as np

    if len(a) != len(b) or len(a) < 3:
        raise ScoringError("a rank correlation needs three pairs or more")
    x, y = ranks(a), ranks(b)
    if x.std() == 0 or y.std() == 0:
        raise ScoringError("a rank correlation needs scores that differ")
    return float(np.corrcoef(x, y)[0, 1])
