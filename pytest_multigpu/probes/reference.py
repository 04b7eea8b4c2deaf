"""The score in float64 numpy, and what scores are compared with. Written apart from the torch
scorer, from the definition in :class:`.probe.Probe`. Imports :mod:`.probe`; numpy inside functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..errors import ScoringError
from .probe import Aggregation, Probe

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]


def reference_scores(probe: Probe, activations: Mapping[int, Floats]) -> Floats:
    """Scores ``(n_tokens,)`` in float64, standardising first.

    :param activations: layer to ``(n_tokens, hidden)`` at the probe's site.
    """
    import numpy as np

    per_layer = []
    for position, layer in enumerate(probe.layers):
        x = np.asarray(activations[layer], dtype=np.float64)
        if probe.normalize and probe.mean is not None and probe.scale is not None:
            x = (x - probe.mean[position]) / probe.scale[position]
        per_layer.append(x @ probe.directions[position])
    return np.asarray(np.mean(per_layer, axis=0) + probe.bias, dtype=np.float64)


def affine_scores(probe: Probe, activations: Mapping[int, Floats]) -> Floats:
    """The same through :meth:`Probe.affine`: ``x . weight + bias``."""
    import numpy as np

    parts = [
        np.asarray(activations[layer], dtype=np.float64) @ weight + bias
        for layer, (weight, bias) in zip(probe.layers, probe.affine(), strict=True)
    ]
    return np.asarray(np.mean(parts, axis=0), dtype=np.float64)


def aggregate(scores: Sequence[float] | Floats, how: Aggregation) -> float:
    """One text's score from its tokens' scores, in order.

    :raises ScoringError: no token, or a score that is not finite.
    """
    import numpy as np

    values = np.asarray(scores, dtype=np.float64)
    if values.size == 0:
        raise ScoringError("no token to score")
    if not np.isfinite(values).all():
        at = int(np.flatnonzero(~np.isfinite(values))[0])
        raise ScoringError(f"the score of scored token {at} is {values[at]}, not a number to use")
    if how == "mean":
        return float(values.mean())
    return float(values.max()) if how == "max" else float(values[-1])


def relative_error(found: Sequence[float] | Floats, expected: Sequence[float] | Floats) -> float:
    """Largest difference over the expected values' root mean square: a token whose score happens
    to be near zero does not inflate it."""
    import numpy as np

    got, want = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    size = float(np.sqrt(np.mean(want * want)))
    worst = float(np.max(np.abs(got - want)))
    return worst / size if size > 0 else (0.0 if worst == 0 else float("inf"))
