"""What a run measured that a later run is compared with, and the rule that compares.

Imports only the standard library.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["peak", "load", "speed", "score"]
KINDS: tuple[Kind, ...] = ("peak", "load", "speed", "score")
UNITS: Mapping[Kind, str] = {"peak": "bytes", "load": "s", "speed": "tokens/s", "score": "score"}
DEFAULT_RULE = "peak:2%+256MiB load:50%+5s speed:10% score:0.1"


@dataclass(frozen=True, kw_only=True)
class BaselineKey:
    """What must be equal for two runs to be comparable."""

    hardware: str
    """``4 x NVIDIA H100 80GB HBM3``; several kinds in CUDA's order, ``1 x A + 2 x B``; ``cpu``. And
    ``with expandable segments``, if torch's allocator has them."""
    model: str
    tier: str
    dtype: str
    """``bfloat16`` or ``float16``: what is computed in, and in 16 bit what is stored."""
    placement: str
    weights: str
    context_tokens: int
    batch: int
    torch: str
    """Major and minor version, ``2.11``."""
    transformers: str

    @property
    def text(self) -> str:
        """The key in the file and in messages."""
        return (
            f"{self.hardware}, {self.model}, {self.tier} {self.dtype}, {self.placement}, "
            f"{self.weights}, context {self.context_tokens} x {self.batch}, "
            f"torch {self.torch}, transformers {self.transformers}"
        )


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One number. ``peak`` is in bytes, ``load`` in s, ``speed`` in tokens/s, ``score`` in the
    probe's own unit."""

    name: str
    """``prefill peak``, ``load time``, ``decode speed``."""
    kind: Kind
    value: float
    device: str = ""
    spread: float = 1.0
    """Of a ``score``: the standard deviation of the scores, which its tolerance is in; above 0."""

    @property
    def key(self) -> str:
        return f"{self.name} @ {self.device}" if self.device else self.name


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """The measurements of one key, by :attr:`Measurement.key`."""

    key: str
    values: Mapping[str, Measurement]


@dataclass(frozen=True)
class Tolerance:
    """How much worse is still equal: ``baseline * fraction + absolute`` (bytes, s, tokens/s,
    standard deviations of the scores)."""

    fraction: float = 0.0
    absolute: float = 0.0
