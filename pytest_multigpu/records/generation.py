"""What a greedy generation did and how long it took. Imports only the standard library."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Final

SLOW: Final = 1.5
"""A pass whose steps take this many times a repeat's is worth a word."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One generation. Seconds, every GPU synchronised at each boundary."""

    prefill_seconds: float
    decode_seconds: tuple[float, ...]
    """One a token after the first."""
    waiting_seconds: tuple[float, ...] = ()
    """Of each decode step, how long Python waited for the GPUs once it had queued all work."""

    @property
    def step_seconds(self) -> float | None:
        """Median decode step; None if there was none."""
        return median(self.decode_seconds) if self.decode_seconds else None

    def times(self, other: Timing) -> float:
        """How many steps of ``other`` one of these takes; 0 if a step of either was not timed."""
        mine, its = self.step_seconds, other.step_seconds
        return mine / its if mine and its else 0.0

    def is_slow_beside(self, other: Timing) -> bool:
        """More than ``SLOW`` times; not if a step of either was not timed."""
        return self.times(other) > SLOW

    @property
    def waiting_share(self) -> float | None:
        """Share of the decode time in which the GPUs were the ones waited for."""
        total = sum(self.decode_seconds)
        return sum(self.waiting_seconds) / total if total > 0 else None


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Cached decoding beside one uncached forward over the same text."""

    relative_errors: tuple[float, ...]
    """For each new token: RMS of the difference of the logits over their standard deviation."""
    clear_tokens: int
    """Positions whose best logit leads by more than twice the largest difference allowed."""
    differing_tokens: int
    """Of those, how many have another best token in the uncached forward."""


@dataclass(frozen=True, kw_only=True)
class GenerationReading:
    """Two greedy generations of the same prompt, and what they are held against."""

    prompt_tokens: int
    first_tokens: tuple[int, ...]
    second_tokens: tuple[int, ...]
    nonfinite_positions: tuple[int, ...]
    """Positions of the text whose logits hold NaN or infinity; 0 is the first prompt token."""
    positions: int
    """How many positions were looked at."""
    agreement: Agreement
    first: Timing
    """At lengths that this process had not seen before."""
    repeat: Timing
    """The same lengths again."""
    repeat_errors: tuple[float, ...] = ()
    """For each new token: RMS of the difference of the second time's logits from the first time's,
    over their standard deviation. Of the same text as long as the tokens are equal."""
    cudnn_attention: bool | None = None
    """Was cuDNN attention allowed; None without CUDA."""
    launch_seconds: float | None = None
    """Of one elementwise kernel from Python: how fast this CPU feeds a GPU; None without CUDA."""
    new_lengths: Timing | None = None
    """At more lengths that no pass had met; measured only if the first pass was slow, as it can be
    for what is loaded or compiled but once."""
    without_cudnn: Timing | None = None
    """At yet more of them with cuDNN attention off; measured only if those were slow as well."""
