"""The probe's scores can be believed on this model, on these GPUs.

One full forward is shared by all checks; the others are short or leave early.
Imports pytest, the probes' readings and their judges.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from pytest_multigpu.judging import probe as judge
from pytest_multigpu.judging.drift import judge_drift
from pytest_multigpu.probes import observe
from pytest_multigpu.probes.drift import drift_between
from pytest_multigpu.probes.invariants import fit, scored, ways
from pytest_multigpu.probes.observe import Observed
from pytest_multigpu.probes.probe import Probe
from pytest_multigpu.probes.scoring import score_chats
from pytest_multigpu.records.check import Record

if TYPE_CHECKING:
    from pytest_multigpu.session import GpuSession

pytestmark = pytest.mark.check(needs="model")


@pytest.fixture(scope="module")
def observed(gpu_model: Any) -> Observed:
    """One full forward with a hook on every layer, on short text."""
    return observe.observe(gpu_model.model, gpu_model.tokenizer)


@pytest.fixture(scope="module")
def shift_limits(gpu_model: Any) -> tuple[float, float]:
    """How far rounding alone may move scores: mean, token, in standard deviations."""
    return judge.shift_limits(gpu_model.architecture.dtype, gpu_model.architecture.tier)


def test_probe_fits_model(gpu_model: Any, gpu_probe: Probe) -> list[Record]:
    """Hidden size, layers and model id."""
    name = gpu_model.architecture.model
    return judge.judge_fit(fit.fit_of(gpu_probe, gpu_model.model, name))


def test_activation_size(gpu_model: Any, gpu_probe: Probe, observed: Observed) -> Record:
    """Activations are as large as the probe's scaler saw them: right site, layer and model."""
    from_scaler = gpu_probe.scale is not None
    probe = gpu_probe
    if not from_scaler:
        probe = fit.with_scaler(gpu_model.model, gpu_model.tokenizer, gpu_probe)
    readings = fit.read_sizes(gpu_model.model, probe, observed)
    return judge.judge_size(readings, from_scaler=from_scaler)


def test_activations(observed: Observed) -> list[Record]:
    """Finite and non-zero at every layer, and unchanged on their way between GPUs."""
    layers = judge.judge_layers(observe.read_layers(observed))
    return [layers, *map(judge.judge_boundary, observed.boundaries)]


def test_hook_equals_hidden_states(
    gpu_model: Any, gpu_probe: Probe, observed: Observed
) -> list[Record]:
    """What is scored is ``hidden_states[layer]`` bit for bit, at the probe's site."""
    return [judge.judge_hook(r) for r in scored.read_hooks(gpu_model.model, gpu_probe, observed)]


def test_scored_tokens(gpu_model: Any, gpu_probe: Probe, observed: Observed) -> Record:
    """The assistant's tokens, widened as the probe says, and no others."""
    tokenizer = gpu_model.tokenizer
    score = score_chats(gpu_model.model, tokenizer, gpu_probe, [observed.messages])[0]
    return judge.judge_span(scored.read_span(tokenizer, gpu_probe, observed, score))


def test_score_arithmetic(gpu_model: Any, gpu_probe: Probe, observed: Observed) -> list[Record]:
    """Scores agree with float64 numpy: standardised, affine, sign, mean, max and last."""
    readings = scored.read_arithmetic(gpu_model.model, gpu_probe, observed)
    return [judge.judge_arithmetic(reading) for reading in readings]


def test_planted_direction(gpu_model: Any, gpu_probe: Probe, observed: Observed) -> list[Record]:
    """A direction added to some tokens moves their scores by what it must, and no others."""
    readings = scored.read_plant(gpu_model.model, gpu_probe, observed)
    return [judge.judge_plant(reading) for reading in readings]


def test_batch_and_padding(
    gpu_model: Any, gpu_probe: Probe, shift_limits: tuple[float, float]
) -> list[Record]:
    """Batches and padding on either side do not change scores beyond rounding."""
    readings = ways.read_batches(gpu_model.model, gpu_model.tokenizer, gpu_probe)
    return [judge.judge_shift(reading, shift_limits) for reading in readings]


def test_cached_generation(
    gpu_model: Any, gpu_probe: Probe, observed: Observed, shift_limits: tuple[float, float]
) -> Record:
    """Scoring a generated text anew agrees with its activations during generation."""
    reading = ways.read_generation(gpu_model.model, gpu_probe, observed)
    return judge.judge_shift(reading, shift_limits)


def test_by_way_of_the_host(gpu_model: Any, gpu_probe: Probe, observed: Observed) -> Record:
    """Activations copied through the host's memory give the same scores, to the bit."""
    reading = ways.read_host_path(gpu_model.model, gpu_probe, observed)
    return judge.judge_shift(reading, (0.0, 0.0))


def test_drift(
    gpu_session: GpuSession, gpu_model: Any, gpu_probe: Probe, shift_limits: tuple[float, float]
) -> list[Record]:
    """Scores of a fixed text set, beside those of other tiers and earlier runs in drift.json."""
    scores = gpu_session.score_texts()
    return judge_drift(scores, gpu_session.earlier_scores, drift_between, shift_limits)
