"""Every invariant holds on an honest model, and each planted mistake is red for its own reason."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from pytest_multigpu.errors import ProbeFileError, ScoringError
from pytest_multigpu.judging import probe as judge
from pytest_multigpu.probes import capture, invariants, observe, scoring
from pytest_multigpu.probes.observe import CHATS, Observed
from pytest_multigpu.probes.probe import Probe, TokenMask
from pytest_multigpu.probes.scoring import score_chats
from pytest_multigpu.probes.synthetic import synthetic_probe
from pytest_multigpu.records.check import Record

HIDDEN, LAYERS = 64, 6
FLOAT32 = judge.shift_limits("float32", "cpu")


def variants() -> list[Any]:
    made = []
    for site in ("raw", "final_norm"):
        for layers in ((3,), (1, 4), (LAYERS,), (0,)):
            for normalize in (False, True):
                probe = synthetic_probe(HIDDEN, LAYERS, layers=layers, site=site)  # type: ignore[arg-type]
                rng = np.random.default_rng(7)
                scaler = {
                    "mean": tuple(rng.standard_normal(HIDDEN) for _ in layers),
                    "scale": tuple(rng.random(HIDDEN) + 0.5 for _ in layers),
                }
                probe = dataclasses.replace(probe, normalize=normalize, bias=0.3, **scaler)  # type: ignore[arg-type]
                made.append(pytest.param(probe, id=f"{site}-{layers}-{normalize}"))
    return made


def records(model: Any, tokenizer: Any, probe: Probe, seen: Observed) -> list[Record]:
    """What the shipped checks find, but for the ratio."""
    score = score_chats(model, tokenizer, probe, [seen.messages])[0]
    return [
        *judge.judge_fit(invariants.fit_of(probe, model, "tiny")),
        judge.judge_layers(observe.read_layers(seen)),
        *map(judge.judge_boundary, seen.boundaries),
        *map(judge.judge_hook, invariants.read_hooks(model, probe, seen)),
        judge.judge_span(invariants.read_span(tokenizer, probe, seen, score)),
        *map(judge.judge_arithmetic, invariants.read_arithmetic(model, probe, seen)),
        *map(judge.judge_plant, invariants.read_plant(model, probe, seen)),
        *(judge.judge_shift(r, FLOAT32) for r in invariants.read_batches(model, tokenizer, probe)),
        judge.judge_shift(invariants.read_generation(model, probe, seen), FLOAT32),
        judge.judge_shift(invariants.read_host_path(model, probe, seen), (0.0, 0.0)),
    ]


@pytest.mark.parametrize("probe", variants())
def test_all_hold(model: Any, tokenizer: Any, observed: Observed, probe: Probe) -> None:
    found = records(model, tokenizer, probe, observed)
    assert [record for record in found if record.outcome != "passed"] == []
    assert len(found) == 16 + 2 * (len(probe.layers) - 1)
