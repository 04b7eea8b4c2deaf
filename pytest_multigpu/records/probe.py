"""What was measured of a probe on a model: readings, before any judgement; and where one reads.

Imports the standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass

DEPTH = 22 / 80
"""Where the published deception probes of Llama-3.3-70B read: ``hidden_states[22]`` of 80."""


def default_layer(num_layers: int) -> int:
    """``hidden_states`` index at 22/80 of the depth, at least 1."""
    return max(1, round(DEPTH * num_layers))


@dataclass(frozen=True, kw_only=True)
class ProbeFit:
    """What a probe claims beside what the model has."""

    probe_hidden: int
    model_hidden: int
    probe_layers: tuple[int, ...]
    """``hidden_states`` indices."""
    model_layers: int
    """Decoder blocks; ``hidden_states`` has one more."""
    probe_model: str | None
    model: str


@dataclass(frozen=True, kw_only=True)
class HookReading:
    """The scorer's activations at one layer beside ``output_hidden_states``, byte by byte."""

    layer: int
    site: str
    device: str
    differing: int
    """Values whose bits differ; all of them if the shapes do."""
    same_neighbours: tuple[int, ...] = ()
    """Neighbouring layers whose bits are the same as this one's."""


@dataclass(frozen=True, kw_only=True)
class SpanReading:
    """Scored tokens beside those found from the template alone."""

    expected: tuple[int, ...]
    found: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ArithmeticReading:
    """Scores in float32 torch beside float64 numpy, on the same activations."""

    form: str
    """``standardised``, ``affine``, ``sign``, ``mean``, ``max``, ``last``."""
    device: str
    relative_error: float


@dataclass(frozen=True, kw_only=True)
class PlantReading:
    """A direction added to the residual stream at some tokens, and what came of it."""

    layer: int
    device: str
    expected_shift: float
    measured_shift: float
    """Mean change of the planted tokens' scores."""
    elsewhere: float
    """Largest change of another token's score."""
    cosine: float
    """Between the probe's weight and the activations' mean change."""


@dataclass(frozen=True, kw_only=True)
class ShiftReading:
    """The same tokens scored in another way, in standard deviations of the token scores."""

    way: str
    """``batch padded right``, ``cached generation``, ``by way of the host``."""
    tokens: int
    mean_shift: float
    """Largest change of a text's mean."""
    token_shift: float
    """Largest change of one token."""


@dataclass(frozen=True, kw_only=True)
class LayerReading:
    """One layer's activations: tokens with a value not finite, tokens that are zero."""

    layer: int
    device: str
    tokens: int
    not_finite: int
    zero: int


@dataclass(frozen=True, kw_only=True)
class BoundaryReading:
    """Activations as one device sent them and the next one got them, compared via the host."""

    layer: int
    """``hidden_states`` index of what was sent."""
    source: str
    target: str
    differing: int | None
    """Values whose bits differ; None if what the next one got could not be seen."""


@dataclass(frozen=True, kw_only=True)
class SizeReading:
    """Mean observed ``|x|^2`` over the probe's ``sum(mean^2 + scale^2)``, at one layer and site."""

    layer: int
    site: str
    ratio: float
    own_layer: int
    """The probe's layer whose mean and scale these are."""
    is_probe: bool = False
    """Whether it is where the probe reads."""
