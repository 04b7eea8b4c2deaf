"""A linear probe on the residual stream: the record that every format is read into.

Imports errors; numpy inside functions only.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from ..errors import ProbeFileError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Vector = NDArray[np.float64]

Site = Literal["raw", "final_norm"]
Aggregation = Literal["mean", "max", "last"]
SITES: tuple[Site, ...] = ("raw", "final_norm")
AGGREGATIONS: tuple[Aggregation, ...] = ("mean", "max", "last")
MAX_HIDDEN = 1 << 17
MAX_LAYERS = 1 << 10
MAX_VALUES = 1 << 23
"""Layers times hidden size: 126 layers of 16,384 take 2,064,384."""


@dataclass(frozen=True, kw_only=True)
class TokenMask:
    """Which tokens of a chat are scored: the text of the messages of ``roles``, widened."""

    roles: tuple[str, ...] = ("assistant",)
    left: int = 0
    """Tokens added before each message: 4 takes in Llama 3's role header."""
    right: int = 0
    """Tokens added after each message: 1 takes in the end-of-turn token."""
    exclude_last: int = 0
    """Tokens dropped at the end of what is left."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Probe:
    """Score of a token: the mean over layers of ``((x - mean) / scale) . direction``, plus
    ``bias``; ``mean`` and ``scale`` only where ``normalize``. No sigmoid, no epsilon.

    All vectors are read-only float64 numpy arrays of shape ``(hidden,)``, one a layer, in the
    order of ``layers``. What is passed in is copied.

    :raises ProbeFileError: shapes that disagree, a value that is not finite, a scale of zero.
    """

    layers: tuple[int, ...]
    """Indices into ``hidden_states``: 0 is the embedding, ``i`` the output of block ``i - 1``."""
    directions: tuple[Vector, ...]
    mean: tuple[Vector, ...] | None = None
    scale: tuple[Vector, ...] | None = None
    normalize: bool = False
    """Whether ``mean`` and ``scale`` enter the score; if not they only tell the expected size."""
    bias: float = 0.0
    site: Site = "raw"
    """``raw``: the residual stream; ``final_norm``: after the model's last norm."""
    aggregation: Aggregation = "mean"
    mask: TokenMask = field(default_factory=TokenMask)
    model: str | None = None
    """The model it was fitted on."""
    positive_class: str = "deceptive"
    threshold: float | None = None
    """Scores above it are the positive class."""
    dtype: str = "float32"
    """Of the vectors as they were stored."""
    source: str = "memory"
    """Path, or where else it came from; named in every error."""
    format: str = "memory"

    def __post_init__(self) -> None:
        if not 0 < len(self.layers) <= MAX_LAYERS:
            raise self._error("layers", f"holds {len(self.layers)} layers, not 1 to {MAX_LAYERS}")
        for layer in self.layers:
            if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
                raise self._error("layers", f"{layer!r} is not a hidden_states index from 0 up")
        if len(set(self.layers)) != len(self.layers):
            raise self._error("layers", f"{list(self.layers)} names a layer twice")
        for name, allowed in (("site", SITES), ("aggregation", AGGREGATIONS)):
            if getattr(self, name) not in allowed:
                text = f"{getattr(self, name)!r} is not one of {', '.join(allowed)}"
                raise self._error(name, text)
        for name in ("bias", "threshold"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise self._error(name, f"{value} is not a finite number")
        if not self.mask.roles:
            raise self._error("mask.roles", "names no role whose texts are scored")
        for name in ("left", "right", "exclude_last"):
            value = getattr(self.mask, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 16:
                raise self._error(f"mask.{name}", f"{value!r} is not a number of tokens")
        for name in ("directions", "mean", "scale"):
            vectors = getattr(self, name)
            if vectors is not None:
                object.__setattr__(self, name, self._checked(name, vectors))
        if (self.mean is None) != (self.scale is None):
            raise self._error("mean and scale", "one is given without the other")
        if self.normalize and self.scale is None:
            raise self._error("normalize", "is set, but mean and scale are missing")
        for layer, scale in zip(self.layers, self.scale or (), strict=False):
            if not (scale > 0).all():
                raise self._error("scale", f"of layer {layer} is not above zero everywhere")

    @property
    def hidden_size(self) -> int:
        return len(self.directions[0])

    def affine(self) -> tuple[tuple[Vector, float], ...]:
        """``(weight, bias)`` of each layer, so that a token's score is the mean over layers of
        ``x . weight + bias``: ``weight = direction / scale``, ``bias`` holds ``-mean . weight``."""
        pairs = []
        for position, direction in enumerate(self.directions):
            weight, bias = direction, self.bias
            if self.normalize and self.mean is not None and self.scale is not None:
                weight = direction / self.scale[position]
                bias -= float(self.mean[position] @ weight)
            pairs.append((weight, bias))
        return tuple(pairs)

    def folded(self) -> Probe:
        """The same score, up to rounding, without a scaler: in direction and bias alone."""
        pairs = self.affine()
        return dataclasses.replace(
            self,
            directions=tuple(weight for weight, _ in pairs),
            bias=sum(bias for _, bias in pairs) / len(pairs),
            mean=None,
            scale=None,
            normalize=False,
        )

    @property
    def digest(self) -> str:
        """Of everything that enters a score: equal for one probe in two file formats."""
        scaler = (self.mean, self.scale) if self.normalize else (None, None)
        enters = (self.layers, self.bias, self.site, self.aggregation, self.mask)
        found = hashlib.sha256(repr(enters).encode())
        for vectors in (self.directions, *scaler):
            for vector in vectors or ():
                found.update(vector.tobytes())
        return found.hexdigest()[:16]

    def same_as(self, other: Probe) -> bool:
        """Whether both score alike: every field but ``source``, ``format`` and ``dtype``."""
        import numpy as np

        for name in {item.name for item in fields(self)} - {"source", "format", "dtype"}:
            mine, theirs = getattr(self, name), getattr(other, name)
            if name in {"directions", "mean", "scale"}:
                if (mine is None) != (theirs is None):
                    return False
                pairs = zip(mine or (), theirs or (), strict=False)
                if not all(np.array_equal(a, b) for a, b in pairs):
                    return False
            elif mine != theirs:
                return False
        return True

    def _checked(self, name: str, vectors: Any) -> tuple[Vector, ...]:
        import numpy as np

        if len(vectors) != len(self.layers):
            text = f"has {len(vectors)} vectors for {len(self.layers)} layers"
            raise self._error(name, text)
        checked = []
        for layer, vector in zip(self.layers, vectors, strict=True):
            found = np.asarray(vector)
            if found.dtype.kind not in "fiu" or found.ndim != 1:
                text = f"of layer {layer} is {found.dtype} of shape {found.shape}, not (hidden,)"
                raise self._error(name, text)
            if not 0 < len(found) <= min(MAX_HIDDEN, MAX_VALUES // len(self.layers)):
                raise self._error(name, f"of layer {layer} has {len(found)} values")
            array = np.array(found, dtype=np.float64)
            if not np.isfinite(array).all():
                where = int(np.flatnonzero(~np.isfinite(array))[0])
                raise self._error(name, f"of layer {layer} has {array[where]} at {where}")
            if name == "directions" and not array.any():
                raise self._error(name, f"of layer {layer} is zero everywhere")
            array.setflags(write=False)
            checked.append(array)
        lengths = {len(array) for array in checked}
        if name != "directions":
            lengths.add(self.hidden_size)
        if len(lengths) > 1:
            raise self._error(name, f"has vectors of different lengths {sorted(lengths)}")
        return tuple(checked)

    def _error(self, key: str, text: str) -> ProbeFileError:
        return ProbeFileError(f"{self.source}: {key}: {text}; fix it or export the probe again")
