"""The text set, its scores in batches, and the statistics of a drift."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from pytest_multigpu.errors import ScoringError
from pytest_multigpu.probes import drift, scoring
from pytest_multigpu.probes.drift import drift_between, score_texts
from pytest_multigpu.probes.probe import Probe, TokenMask
from pytest_multigpu.probes.scoring import score_chats
from pytest_multigpu.probes.textset import MAX_TOKENS, TEXTS, text_set

FEW = TEXTS[:7]


def test_the_text_set_is_fixed() -> None:
    """Whoever changes it changes its name: no score of it compares with an earlier one then."""
    assert text_set() == "alibi-60 4d5c8eb8"
    assert len({json.dumps(text) for text in TEXTS}) == len(TEXTS) == 60


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_whichever_role_a_probe_reads_its_texts_differ(
    model: Any, tokenizer: Any, probe: Probe, role: str
) -> None:
    reader = dataclasses.replace(probe, mask=TokenMask(roles=(role,)))
    values, _ = score_texts(model, tokenizer, reader, FEW)
    assert len(set(values)) >= 4


def test_batches_score_what_single_texts_do(model: Any, tokenizer: Any, probe: Probe) -> None:
    single = [score.value for score in score_chats(model, tokenizer, probe, FEW)]
    found, _ = score_texts(model, tokenizer, probe, FEW, max_tokens=300)
    assert found == pytest.approx(single, rel=1e-5)
    assert len(set(found)) == len(FEW)


def test_batches_stay_within_their_tokens(
    model: Any, tokenizer: Any, probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, int]] = []
    real = scoring.pad

    def padded(rows: Any, side: Any) -> Any:
        found = real(rows, side)
        shapes.append(tuple(found.input_ids.shape))  # type: ignore[arg-type]
        return found

    monkeypatch.setattr(scoring, "pad", padded)
    values, _ = score_texts(model, tokenizer, probe)
    assert len(values) == 60
    assert all(rows * tokens <= MAX_TOKENS for rows, tokens in shapes)
    assert sum(rows for rows, _ in shapes) == 60
    # A quarter of what one at a time would take, at most.
    assert len(shapes) <= 15
    shapes.clear()
    score_texts(model, tokenizer, probe, FEW, max_tokens=1)
    assert [rows for rows, _ in shapes] == [1] * len(FEW)


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([], []),
        ([5], [(0, 1)]),
        ([5, 5, 5], [(0, 2), (2, 3)]),
        ([1, 1, 9], [(0, 2), (2, 3)]),
        ([11, 1, 1], [(0, 1), (1, 3)]),
        ([5, 6], [(0, 1), (1, 2)]),
    ],
)
def test_batches(lengths: list[int], expected: list[tuple[int, int]]) -> None:
    assert drift._batches(lengths, 10) == expected


def test_another_template_mask_or_batch_is_another_tokens_digest(
    model: Any, tokenizer: Any, probe: Probe
) -> None:
    _, tokens = score_texts(model, tokenizer, probe, FEW)
    assert score_texts(model, tokenizer, probe, FEW)[1] == tokens
    other = copy.deepcopy(tokenizer)
    other.chat_template = tokenizer.chat_template.replace("\n\n", "\n")
    assert score_texts(model, other, probe, FEW)[1] != tokens
    wider = dataclasses.replace(probe, mask=dataclasses.replace(probe.mask, left=0))
    assert score_texts(model, tokenizer, wider, FEW)[1] != tokens
    assert score_texts(model, tokenizer, probe, FEW, max_tokens=300)[1] != tokens


def test_a_template_that_prints_the_date_gives_the_same_tokens_tomorrow(
    model: Any, tokenizer: Any, probe: Probe
) -> None:
    dated = copy.deepcopy(tokenizer)
    # As Llama 3.2's does.
    today = "{% if date_string is not defined %}{% set date_string = strftime_now('%d') %}"
    today += "{% endif %}"
    dated.chat_template = today + "{{ date_string }}" + tokenizer.chat_template
    _, tokens = score_texts(model, dated, probe, FEW)
    dated.chat_template = "26 Jul 2024" + tokenizer.chat_template
    assert score_texts(model, dated, probe, FEW)[1] == tokens


def test_a_score_that_is_no_number_is_no_score(model: Any, tokenizer: Any, probe: Probe) -> None:
    nan = float("nan")
    handle = model.model.layers[1].register_forward_hook(lambda m, a, output: output * nan)
    try:
        with pytest.raises(ScoringError, match=r"^the score of scored token 0 is nan"):
            score_texts(model, tokenizer, probe, FEW)
    finally:
        handle.remove()


def test_drift_in_standard_deviations() -> None:
    base = [0.0, 2.0, 4.0]
    reading = drift_between(base, [1.0, 3.0, 5.0])
    deviation = float(np.std(base))
    assert (reading.shift, reading.spread) == pytest.approx((1 / deviation, 0))
    assert (reading.scale, reading.rank_correlation) == pytest.approx((1, 1))
    assert reading.largest == pytest.approx(1 / deviation)
    assert reading.texts == 3
    assert not reading.equal
    reading = drift_between(base, [0.0, -4.0, 4.0])
    assert (reading.shift, reading.largest) == pytest.approx((-2 / deviation, 6 / deviation))
    assert reading.rank_correlation == pytest.approx(0.5)


def test_equal_is_to_the_bit() -> None:
    base = [0.1, 0.2, 0.3]
    assert drift_between(base, list(base)).equal
    assert not drift_between(base, [0.1, 0.2, 0.1 + 0.2]).equal


@pytest.mark.parametrize(
    ("base", "other", "text"),
    [
        ([0.0, 1.0, 2.0], [1.0], "1 scores can't be compared with 3"),
        ([0.0, 1.0, 2.0], [1.0, float("nan"), 2.0], "a score is not finite"),
        ([1.0, 1.0, 1.0], [1.0, 2.0, 3.0], "a rank correlation needs scores that differ"),
        ([1.0, 2.0], [1.0, 2.0], "a rank correlation needs three pairs or more"),
        ([0.0, 0.0, 5e-324], [1.0, 2.0, 3.0], "scores that are all the same can't be compared"),
    ],
)
def test_what_cannot_be_compared(base: list[float], other: list[float], text: str) -> None:
    with pytest.raises(ScoringError) as error:
        drift_between(base, other)
    assert str(error.value) == text


def test_the_digest_of_a_probe_is_of_what_enters_a_score(probe: Probe) -> None:
    same = dataclasses.replace(
        probe, source="elsewhere", format="x", threshold=3.0, model="m", positive_class="y"
    )
    assert same.digest == probe.digest
    scaler = {"mean": (np.ones(64),), "scale": (np.ones(64),)}
    assert dataclasses.replace(probe, **scaler).digest == probe.digest  # type: ignore[arg-type]
    changed = [
        dataclasses.replace(probe, **scaler, normalize=True),  # type: ignore[arg-type]
        dataclasses.replace(probe, bias=0.1),
        dataclasses.replace(probe, site="final_norm"),
        dataclasses.replace(probe, aggregation="max"),
        dataclasses.replace(probe, layers=(4,)),
        dataclasses.replace(probe, mask=dataclasses.replace(probe.mask, right=0)),
        dataclasses.replace(probe, directions=(probe.directions[0] * 2,)),
    ]
    assert len({probe.digest, *(one.digest for one in changed)}) == 1 + len(changed)
