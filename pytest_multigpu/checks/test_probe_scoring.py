"""The probe's scores can be believed on this model, on these GPUs.

One full forward, one early one for each short chat and the generation that the generation checks
watch are shared; what else is run leaves early.
Imports pytest, the probes' readings and their judges.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from pytest_multigpu.judging import probe as judge
from pytest_multigpu.judging.drift import judge_drift
from pytest_multigpu.probes import observe
from pytest_multigpu.probes.alone import Alone
from pytest_multigpu.probes.drift import drift_between
from pytest_multigpu.probes.invariants import fit, scored, ways
from pytest_multigpu.probes.observe import Observed
from pytest_multigpu.probes.probe import Probe
from pytest_multigpu.records.check import Record

if TYPE_CHECKING:
    from pytest_multigpu.model.generation import Generated
    from pytest_multigpu.probes.witness import Witness
    from pytest_multigpu.session import GpuSession

pytestmark = pytest.mark.check(needs="model")


@pytest.fixture(scope="module")
def observed(gpu_model: Any) -> Observed:
    """One full forward with a hook on every layer, on short text."""
    return observe.observe(gpu_model.model, gpu_model.tokenizer)


@pytest.fixture(scope="module")
def alone(gpu_model: Any, gpu_probe: Probe) -> Alone:
    """Each short chat scored by itself, when it is first asked for."""
    return Alone(gpu_model.model, gpu_model.tokenizer, gpu_probe)


@pytest.fixture(scope="module")
def shift_limits(gpu_model: Any) -> tuple[float, float]:
    """How far rounding alone may move scores: mean, token, in standard deviations."""
    return judge.shift_limits(gpu_model.architecture.dtype, gpu_model.architecture.tier)


def test_probe_fits_model(gpu_model: Any, gpu_probe: Probe) -> list[Record]:
    """Hidden size, layers and model id."""
    name = gpu_model.architecture.model
    return judge.judge_fit(fit.fit_of(gpu_probe, gpu_model.model, name))


def test_activation_size(
    gpu_model: Any, gpu_probe: Probe, observed: Observed, alone: Alone
) -> list[Record]:
    """Activations are as large as the probe's scaler saw them: right site, layer and model."""
    from_scaler = gpu_probe.scale is not None
    probe = gpu_probe
    if not from_scaler:
        probe = fit.with_scaler(alone)
    readings = fit.read_sizes(gpu_model.model, probe, observed)
    records = [judge.judge_size(readings, from_scaler=from_scaler)]
    # A synthesised probe was fitted nowhere: every place is its own.
    if not from_scaler and gpu_probe.format != "synthetic":
        records.append(judge.judge_site(gpu_probe.site))
    return records


def test_activations(observed: Observed) -> list[Record]:
    """Finite and non-zero at every layer, and unchanged on their way between GPUs."""
    layers = judge.judge_layers(observe.read_layers(observed))
    return [layers, *map(judge.judge_boundary, observed.boundaries)]


def test_hook_equals_hidden_states(
    gpu_model: Any, gpu_probe: Probe, observed: Observed, alone: Alone
) -> list[Record]:
    """What is scored is ``hidden_states[layer]`` bit for bit, at the probe's site."""
    readings = scored.read_hooks(gpu_model.model, gpu_probe, observed, alone.streams(0))
    return [judge.judge_hook(reading) for reading in readings]


def test_scored_tokens(
    gpu_model: Any, gpu_probe: Probe, observed: Observed, alone: Alone
) -> Record:
    """The assistant's tokens, widened as the probe says, and no others."""
    reading = scored.read_span(gpu_model.tokenizer, gpu_probe, observed, alone.score(0))
    return judge.judge_span(reading)


def test_score_arithmetic(gpu_model: Any, gpu_probe: Probe, observed: Observed) -> list[Record]:
    """Scores agree with float64 numpy: standardised, affine, sign, mean, max and last."""
    readings = scored.read_arithmetic(gpu_model.model, gpu_probe, observed)
    return [judge.judge_arithmetic(reading) for reading in readings]


def test_planted_direction(gpu_model: Any, gpu_probe: Probe, observed: Observed) -> list[Record]:
    """A direction added to some tokens moves their scores by what it must, and no others."""
    readings = scored.read_plant(gpu_model.model, gpu_probe, observed)
    return [judge.judge_plant(reading) for reading in readings]


def test_batch_and_padding(alone: Alone, shift_limits: tuple[float, float]) -> list[Record]:
    """Batches and padding on either side do not change scores beyond rounding."""
    return [judge.judge_shift(reading, shift_limits) for reading in ways.read_batches(alone)]


def test_cached_generation(
    gpu_model: Any,
    gpu_probe: Probe,
    watched_generation: tuple[Generated, Witness],
    shift_limits: tuple[float, float],
) -> Record:
    """Scoring a generated text anew agrees with its activations during generation."""
    generated, witness = watched_generation
    reading = ways.read_generation(gpu_model.model, gpu_probe, witness.streams(), generated.text)
    return judge.judge_shift(reading, shift_limits)


def test_by_way_of_the_host(alone: Alone) -> Record:
    """Activations copied through the host's memory give the same scores, to the bit."""
    return judge.judge_shift(ways.read_host_path(alone), (0.0, 0.0))


def test_drift(
    gpu_session: GpuSession, gpu_model: Any, gpu_probe: Probe, shift_limits: tuple[float, float]
) -> list[Record]:
    """Scores of a fixed text set, beside those of other tiers and earlier runs in drift.json."""
    scores = gpu_session.score_texts()
    return judge_drift(scores, gpu_session.earlier_scores, drift_between, shift_limits)
