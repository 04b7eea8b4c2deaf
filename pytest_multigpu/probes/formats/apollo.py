"""Detectors of the published deception probes: raw pickles, in three layouts.

``layers`` and ``directions`` (mean difference, LAT); those plus ``scaler_mean``,
``scaler_scale``, ``normalize``, ``reg_coeff`` (logistic regression); or ``directions`` as
``{layer: array}`` with ``intercept``, ``model_name``, ``exclude_last_n_tokens``.
Layers are ``hidden_states`` indices. ``reg_coeff`` is not part of the score.
Imports :mod:`.pickles`, :mod:`..probe`, errors; numpy inside functions.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from ...errors import ProbeFileError
from ..probe import MAX_LAYERS, Aggregation, Probe, Site, TokenMask
from .guard import guarded
from .pickles import read_pickle

_KEYS = frozenset(
    [
        "layers",
        "directions",
        "scaler_mean",
        "scaler_scale",
        "normalize",
        "reg_coeff",
        "intercept",
        "model_name",
        "exclude_last_n_tokens",
        "threshold",
    ]
)


def load(path: Path, data: bytes) -> Probe:
    """:raises ProbeFileError: refused, damaged, or not one of the three layouts."""
    content = read_pickle(path, data)
    if not isinstance(content, dict) or "directions" not in content:
        raise ProbeFileError(f"{path}: has no key 'directions'; is it a detector.pt?")
    unknown = [str(key) for key in content if key not in _KEYS]
    if unknown:
        known = ", ".join(sorted(_KEYS))
        raise ProbeFileError(f"{path}: unknown key {unknown[0]!r}; known: {known}")
    probe = guarded(path, lambda: _probe(path, content))
    assert isinstance(probe, Probe)
    return probe


def _probe(path: Path, content: dict[Any, Any]) -> Probe:
    directions = content["directions"]
    by_layer = isinstance(directions, dict)
    layers = _layers(path, content.get("layers", list(directions) if by_layer else None))
    normalize = content.get("normalize")
    if normalize is None:
        normalize = content.get("scaler_scale") is not None
    if not isinstance(normalize, bool):
        raise ProbeFileError(f"{path}: normalize: {normalize!r} is not true or false")
    exclude = content.get("exclude_last_n_tokens") or 0
    name = content.get("model_name")
    if name is not None and not isinstance(name, str):
        raise ProbeFileError(f"{path}: model_name: is not text")
    # The published code cuts the model at the layer, so that the one layer it reads has been
    # through the final norm; detectors fitted elsewhere read the residual stream.
    site: Site = "raw" if by_layer or len(layers) > 1 else "final_norm"
    aggregation: Aggregation = "mean"
    return Probe(
        layers=layers,
        directions=_vectors(path, "directions", directions, layers) or (),
        mean=_vectors(path, "scaler_mean", content.get("scaler_mean"), layers),
        scale=_vectors(path, "scaler_scale", content.get("scaler_scale"), layers),
        normalize=normalize,
        bias=_number(path, "intercept", content.get("intercept")) or 0.0,
        threshold=_number(path, "threshold", content.get("threshold")),
        site=site,
        aggregation=aggregation,
        mask=TokenMask(exclude_last=exclude)
        if by_layer
        else TokenMask(left=4, right=1, exclude_last=exclude),
        model=name,
        dtype=_dtype(directions),
        source=str(path),
        format="apollo",
    )


def _layers(path: Path, value: Any) -> tuple[int, ...]:
    import numpy as np

    if isinstance(value, np.ndarray):
        value = value.tolist() if value.ndim == 1 and len(value) <= MAX_LAYERS else None
    if isinstance(value, int) and not isinstance(value, bool):
        value = [value]
    if not isinstance(value, list) or len(value) > MAX_LAYERS:
        raise ProbeFileError(f"{path}: layers: missing, or not a list of layers")
    return tuple(value)


def _vectors(path: Path, key: str, value: Any, layers: tuple[int, ...]) -> tuple[Any, ...] | None:
    import numpy as np

    if value is None:
        return None
    if isinstance(value, dict):
        missing = [layer for layer in layers if layer not in value]
        if missing or len(value) != len(layers):
            raise ProbeFileError(f"{path}: {key}: its layers {list(value)} are not {list(layers)}")
        value = [value[layer] for layer in layers]
    elif isinstance(value, np.ndarray) and value.ndim == 1 and len(layers) == 1:
        value = [value]
    sized = isinstance(value, list) or (isinstance(value, np.ndarray) and value.ndim > 0)
    # A few bytes can be a view of millions of rows: they are counted before they are taken apart.
    rows = list(value) if sized and len(value) <= MAX_LAYERS else None
    if rows is None or not all(isinstance(row, np.ndarray) for row in rows):
        raise ProbeFileError(f"{path}: {key}: is not an array of (layers, hidden)")
    return tuple(row.reshape(-1) if row.ndim == 2 and len(row) == 1 else row for row in rows)


def _number(path: Path, key: str, value: Any) -> float | None:
    import numpy as np

    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.reshape(()).item()
    if isinstance(value, list) and len(value) == 1:
        return _number(path, key, value[0])
    if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        return None if value is None else float(value)
    raise ProbeFileError(f"{path}: {key}: is not one number")


def _dtype(directions: Any) -> str:
    first = next(iter(directions.values()), None) if isinstance(directions, dict) else directions
    return str(getattr(first, "dtype", "float32"))


def files(probe: Probe, name: str) -> list[dict[str, bytes]]:
    """Layers and tensors, with a scaler if there is one; then ``{layer: array}``. Each with the
    keys that the layout has in the wild and no others: its own readers would not see more."""
    import numpy as np
    import torch

    from .native import stored_as

    kind = stored_as(*probe.directions, *(probe.mean or ()), *(probe.scale or ()))

    def tensor(vectors: Any) -> Any:
        return torch.from_numpy(np.stack(vectors).astype(kind))

    tensors: dict[str, Any] = {
        "layers": list(probe.layers),
        "directions": tensor(probe.directions),
    }
    if probe.mean is not None and probe.scale is not None:
        tensors |= {
            "scaler_mean": tensor(probe.mean),
            "scaler_scale": tensor(probe.scale),
            "normalize": probe.normalize,
            "reg_coeff": None,
        }
    arrays = {
        "directions": dict(zip(probe.layers, probe.directions, strict=True)),
        "intercept": probe.bias,
        "model_name": probe.model,
        "exclude_last_n_tokens": probe.mask.exclude_last,
    }
    return [{name: pickle.dumps(content, protocol=4)} for content in (tensors, arrays)]
