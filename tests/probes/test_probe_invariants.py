"""Every invariant holds on an honest model, and each planted mistake is red for its own reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pytest_multigpu.errors import ProbeFileError, ScoringError
from pytest_multigpu.judging import probe as judge
from pytest_multigpu.judging import probe_fit
from pytest_multigpu.probes import capture, observe, scoring
from pytest_multigpu.probes.alone import Alone
from pytest_multigpu.probes.drift import score_texts
from pytest_multigpu.probes.invariants import fit, scored, ways
from pytest_multigpu.probes.observe import CHATS, Observed
from pytest_multigpu.probes.probe import Probe, TokenMask
from pytest_multigpu.probes.scoring import score_chats
from pytest_multigpu.probes.spans import tokenize_chat
from pytest_multigpu.probes.synthetic import synthetic_probe
from pytest_multigpu.probes.witness import Witness
from pytest_multigpu.records.check import Record

HIDDEN, LAYERS = 64, 6
FLOAT32 = judge.shift_limits("float32", "cpu")


def variants() -> list[Any]:
    made = []
    for site in ("raw", "final_norm"):
        for layers in ((3,), (1, 4), (LAYERS,), (0,)):
            for normalize in (False, True):
                probe = synthetic_probe(HIDDEN, LAYERS, layers=layers, site=site)
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
    alone = Alone(model, tokenizer, probe)
    cached, text = generated(model, tokenizer, probe)
    return [
        *probe_fit.judge_fit(fit.fit_of(probe, model, "tiny")),
        judge.judge_layers(observe.read_layers(seen)),
        *map(judge.judge_boundary, seen.boundaries),
        *map(judge.judge_hook, scored.read_hooks(model, probe, seen, alone.streams(0))),
        judge.judge_span(scored.read_span(tokenizer, probe, seen, alone.score(0))),
        *map(judge.judge_arithmetic, scored.read_arithmetic(model, probe, seen)),
        *map(judge.judge_plant, scored.read_plant(model, probe, seen)),
        *(judge.judge_shift(r, FLOAT32) for r in ways.read_batches(alone)),
        judge.judge_shift(ways.read_generation(model, probe, cached, text), FLOAT32),
        judge.judge_shift(ways.read_host_path(alone), (0.0, 0.0)),
    ]


def generated(model: Any, tokenizer: Any, probe: Probe) -> tuple[dict[int, Any], tuple[int, ...]]:
    """What a witness saw of a greedy generation of eight tokens, and the whole text."""
    import torch

    prompt = torch.tensor([tokenize_chat(tokenizer, CHATS[0]).input_ids])
    with Witness(model, lambda: probe) as witness:
        text = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=8,
            min_new_tokens=8,
            do_sample=False,
            pad_token_id=0,
        )
    return witness.streams(), tuple(text[0].tolist())


@pytest.mark.parametrize("probe", variants())
def test_all_hold(model: Any, tokenizer: Any, observed: Observed, probe: Probe) -> None:
    found = records(model, tokenizer, probe, observed)
    assert [record for record in found if record.outcome != "passed"] == []
    assert len(found) == 16 + 2 * (len(probe.layers) - 1)


@pytest.mark.parametrize("exclude_last", [5, 6, 30])
def test_all_hold_where_the_last_tokens_are_left_out(
    model: Any, tokenizer: Any, probe: Probe, exclude_last: int
) -> None:
    """A text of the checks' own has six tokens: too few for such a probe."""
    rule = TokenMask(exclude_last=exclude_last)
    leaving = dataclasses.replace(probe, mask=rule)
    seen = observe.observe(model, tokenizer, rule)
    found = records(model, tokenizer, leaving, seen)
    assert [record for record in found if record.outcome != "passed"] == []
    values, _ = score_texts(model, tokenizer, leaving)
    assert len(set(values)) > 50


def test_a_span_of_fewer_tokens_than_are_left_out(
    tokenizer: Any, observed: Observed, probe: Probe
) -> None:
    """The check's own expectation must not count from the other end either."""
    every = dataclasses.replace(probe, mask=TokenMask(exclude_last=27))
    score = scoring.Score(value=0.0, tokens=(0.0,), positions=(0,))
    assert len(observed.chat.chosen(every.mask)) == 26
    assert scored.read_span(tokenizer, every, observed, score).expected == ()


def only(found: list[Record], name: str) -> Record:
    """The one failed record, which must have that name."""
    failed = [record for record in found if record.outcome != "passed"]
    assert [record.name for record in failed] == [name]
    return failed[0]


def test_off_by_one_layer(
    model: Any, tokenizer: Any, observed: Observed, probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        capture.Anatomy, "source", lambda self, layer: self.blocks[min(layer, LAYERS - 1)]
    )
    streams = Alone(model, tokenizer, probe).streams(0)
    record = judge.judge_hook(scored.read_hooks(model, probe, observed, streams)[0])
    assert record.outcome == "failed"
    assert record.reason == "the scorer's activations at site raw are not hidden_states[3]"


def test_off_by_one_layer_does_not_recover_the_plant(
    model: Any, observed: Observed, probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = capture.capture

    def shifted(model: Any, ids: Any, layers: Any, **options: Any) -> Any:
        found = real(model, ids, [layer - 1 for layer in layers], **options)
        return {layer + 1: stream for layer, stream in found.items()}

    monkeypatch.setattr(scoring, "capture", shifted)
    record = judge.judge_plant(scored.read_plant(model, probe, observed)[0])
    assert record.outcome == "failed"
    assert record.reason == "the planted tokens' scores do not move by what was planted"


def test_raw_instead_of_final_norm(
    model: Any, tokenizer: Any, observed: Observed, probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    normed = dataclasses.replace(probe, site="final_norm")
    monkeypatch.setattr(scored, "at_site", lambda model, stream, site: stream)
    streams = Alone(model, tokenizer, normed).streams(0)
    record = judge.judge_hook(scored.read_hooks(model, normed, observed, streams)[0])
    assert record.outcome == "failed"
    assert record.reason == "the scorer's activations at site final_norm are not hidden_states[3]"


def test_wrong_site_in_the_probe_shows_in_the_ratio(
    model: Any, tokenizer: Any, observed: Observed, probe: Probe
) -> None:
    normed = dataclasses.replace(probe, site="final_norm")
    fitted = fit.with_scaler(Alone(model, tokenizer, normed))
    assert probe_fit.judge_size(fit.read_sizes(model, fitted, observed)).outcome == "passed"
    wrong = dataclasses.replace(fitted, site="raw")
    record = probe_fit.judge_size(fit.read_sizes(model, wrong, observed), source="my probe.pt")
    assert record.outcome == "failed"
    assert record.reason.startswith("activations at layer 3, site raw, are ")
    assert ", site final_norm, would fit (" in record.reason
    assert record.remedy == (
        "if it was fitted there: python -m pytest_multigpu.probes convert 'my probe.pt' "
        "moved.safetensors --site final_norm, and --gpu-probe=moved.safetensors"
    )


def test_wrong_layer_in_the_probe_names_the_neighbour(
    model: Any, tokenizer: Any, observed: Observed, probe: Probe
) -> None:
    fitted = fit.with_scaler(Alone(model, tokenizer, dataclasses.replace(probe, layers=(0,))))
    wrong = dataclasses.replace(fitted, layers=(2,))
    record = probe_fit.judge_size(fit.read_sizes(model, wrong, observed), source="p.pt")
    assert record.outcome == "failed"
    assert record.remedy == (
        "if it was fitted there: python -m pytest_multigpu.probes convert p.pt moved.safetensors "
        "--layer 0, and --gpu-probe=moved.safetensors"
    )


def test_batch_row_0_only(
    model: Any, tokenizer: Any, probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = capture.capture

    def first_row(*args: Any, **options: Any) -> Any:
        return {k: x[:1].expand_as(x) for k, x in real(*args, **options).items()}

    monkeypatch.setattr(scoring, "capture", first_row)
    readings = ways.read_batches(Alone(model, tokenizer, probe))
    found = [judge.judge_shift(reading, FLOAT32) for reading in readings]
    assert [record.outcome for record in found] == ["failed", "failed"]
    assert found[0].reason == (
        "scores change when the same text is scored in a batch padded on the right"
    )


def test_a_tensor_is_never_indexed_as_a_tuple() -> None:
    import torch

    stream = torch.zeros(2, 3, 4)
    assert capture.stream_of(stream, 1) is stream
    assert capture.stream_of((stream, None), 1) is stream
    with pytest.raises(ScoringError) as error:
        capture.stream_of(stream[0], 1)
    assert str(error.value) == "hidden_states[1] is (3, 4), not (batch, tokens, hidden)"


def test_padding_not_masked_out(
    model: Any, tokenizer: Any, probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = scoring.pad

    def unmasked(rows: Any, side: Any) -> Any:
        padded = real(rows, side)
        padded.mask.fill_(1)
        return padded

    monkeypatch.setattr(scoring, "pad", unmasked)
    readings = ways.read_batches(Alone(model, tokenizer, probe))
    assert judge.judge_shift(readings[1], FLOAT32).outcome == "failed"


def test_mask_not_widened(
    model: Any, tokenizer: Any, observed: Observed, probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = observed.chat.__class__.mask
    monkeypatch.setattr(observed.chat.__class__, "mask", lambda self, rule: real(self, TokenMask()))
    score = score_chats(model, tokenizer, probe, [observed.messages])[0]
    record = judge.judge_span(scored.read_span(tokenizer, probe, observed, score))
    assert record.outcome == "failed"
    assert record.reason == "5 tokens are not scored that must be, 0 wrongly are"


def test_probe_of_another_model(model: Any, tokenizer: Any, probe: Probe) -> None:
    other = synthetic_probe(HIDDEN * 2, LAYERS, layers=(3,), model="acme/Other-9B")
    hidden, layers, name = probe_fit.judge_fit(fit.fit_of(other, model, "llama-3.3-70b"))
    assert (hidden.outcome, layers.outcome, name.outcome) == ("failed", "passed", "failed")
    assert hidden.reason == "the probe was fitted on a model of another hidden size"
    assert name.reason == "the probe was fitted on another model"
    with pytest.raises(ScoringError) as error:
        score_chats(model, tokenizer, other, [CHATS[0]])
    assert str(error.value) == (
        "the probe has hidden size 128, hidden_states[3] 64; use a probe of this model"
    )


def test_hook_on_a_moved_module(
    model: Any, tokenizer: Any, probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    import copy

    stale = copy.deepcopy(model.model.layers[2])
    monkeypatch.setattr(capture.Anatomy, "source", lambda self, layer: stale)
    with pytest.raises(ScoringError) as error:
        score_chats(model, tokenizer, probe, [CHATS[0]])
    assert str(error.value) == (
        "the hook on hidden_states[3] never ran: its module was replaced or moved after the hook "
        "was set; set hooks on the model as it runs"
    )


def test_activations_zeroed_on_one_device(model: Any, tokenizer: Any) -> None:
    handle = model.model.layers[4].register_forward_hook(lambda m, a, output: output * 0)
    try:
        seen = observe.observe(model, tokenizer)
    finally:
        handle.remove()
    record = judge.judge_layers(observe.read_layers(seen))
    assert record.outcome == "failed"
    total = len(seen.chat.input_ids)
    assert record.reason.startswith(
        f"hidden_states[5] on CPU is zero at {total} of {total} tokens; 2 of 7 layers are affected"
    )


def test_scaler_on_the_wrong_device(
    model: Any, tokenizer: Any, probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted = dataclasses.replace(fit.with_scaler(Alone(model, tokenizer, probe)), normalize=True)
    real = scoring.to_device

    def misplaced(vector: Any, device: Any) -> Any:
        assert fitted.mean is not None
        return real(vector, "meta" if vector is fitted.mean[0] else device)  # type: ignore[arg-type]

    monkeypatch.setattr(scoring, "to_device", misplaced)
    with pytest.raises(ScoringError) as error:
        score_chats(model, tokenizer, fitted, [CHATS[0]])
    assert str(error.value) == (
        "the probe's mean for hidden_states[3] is on meta, its activations on cpu"
    )


def test_an_exception_in_the_scorer_is_no_score(
    model: Any, tokenizer: Any, probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("boom\nand more")

    monkeypatch.setattr(scoring, "_layer_scores", broken)
    with pytest.raises(ScoringError) as error:
        score_chats(model, tokenizer, probe, [CHATS[0]])
    assert str(error.value) == "scoring failed: RuntimeError: boom"


def test_nan_in_one_direction(probe: Probe) -> None:
    direction = probe.directions[0].copy()
    direction[5] = np.nan
    with pytest.raises(ProbeFileError) as error:
        dataclasses.replace(probe, directions=(direction,), source="detector.pt")
    assert str(error.value) == (
        "detector.pt: directions: of layer 3 has nan at 5; fix it or export the probe again"
    )


def test_nan_in_the_activations(model: Any, tokenizer: Any, probe: Probe) -> None:
    nan = float("nan")
    handle = model.model.layers[1].register_forward_hook(lambda m, a, output: output * nan)
    try:
        with pytest.raises(ScoringError) as error:
            score_chats(model, tokenizer, probe, [CHATS[0]])
        record = judge.judge_layers(observe.read_layers(observe.observe(model, tokenizer)))
    finally:
        handle.remove()
    assert str(error.value) == "the score of scored token 0 is nan, not a number to use"
    assert record.reason.startswith("hidden_states[2] on CPU is not finite at ")


def test_layer_out_of_range(model: Any, tokenizer: Any) -> None:
    deep = synthetic_probe(HIDDEN, 80, layers=(22,))
    record = probe_fit.judge_fit(fit.fit_of(deep, model, "tiny"))[1]
    assert (record.outcome, record.reason) == ("failed", "layer 22 is out of range for 6 layers")
    with pytest.raises(ScoringError) as error:
        score_chats(model, tokenizer, deep, [CHATS[0]])
    assert str(error.value) == (
        "layer 22 is out of range: the model has hidden_states 0 to 6; use a probe of this model"
    )


@pytest.mark.parametrize("read", [scored.read_arithmetic, scored.read_plant])
def test_readings_of_a_layer_out_of_range(model: Any, observed: Observed, read: Any) -> None:
    with pytest.raises(ScoringError, match=r"^layer 22 is out of range"):
        read(model, synthetic_probe(HIDDEN, 80, layers=(22,)), observed)


def test_readings_of_another_hidden_size(model: Any, tokenizer: Any, observed: Observed) -> None:
    other = synthetic_probe(HIDDEN * 2, LAYERS, layers=(3,))
    with pytest.raises(ScoringError, match=r"^the probe has hidden size 128, hidden_states"):
        scored.read_plant(model, other, observed)
    with pytest.raises(ScoringError, match=r"^the probe has hidden size 128, hidden_states"):
        fit.with_scaler(Alone(model, tokenizer, other))


def test_a_scaler_is_not_measured_on_nan(model: Any, tokenizer: Any, probe: Probe) -> None:
    """What is wrong is the model, so the error must not name the probe's file."""
    nan = float("nan")
    handle = model.model.layers[1].register_forward_hook(lambda m, a, output: output * nan)
    try:
        with pytest.raises(ScoringError) as error:
            fit.with_scaler(Alone(model, tokenizer, probe))
    finally:
        handle.remove()
    assert str(error.value) == "hidden_states[3] is not finite on other texts"


def test_early_exit_leaves_nothing_behind(model: Any, tokenizer: Any, probe: Probe) -> None:
    import torch

    ids = torch.tensor([[256, 65, 66]])
    before = capture.forward(model, ids).last_hidden_state
    hooks = [len(module._forward_hooks) for module in model.modules()]
    ran: list[int] = []
    handle = model.model.layers[3].register_forward_hook(lambda *_: ran.append(1))
    try:
        score_chats(model, tokenizer, probe, [CHATS[0]])
    finally:
        handle.remove()
    assert ran == []
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert torch.equal(capture.forward(model, ids).last_hidden_state, before)


@pytest.mark.parametrize("site", ["raw", "final_norm"])
def test_dispatched_with_offload_scores_alike(
    make_llama: Callable[[], Any], tokenizer: Any, probe: Probe, site: str
) -> None:
    """Weights on meta between uses, brought by accelerate's hooks: early exit must not break it."""
    import accelerate

    plain, dispatched = make_llama(), make_llama()
    chosen = dataclasses.replace(probe, site=site)  # type: ignore[arg-type]
    accelerate.cpu_offload(dispatched, execution_device="cpu")
    # A norm that is offloaded can't be read; one that is not stands in for a GPU's.
    dispatched.model.norm = plain.model.norm
    expected = score_chats(plain, tokenizer, chosen, [CHATS[0]])
    for _ in range(2):
        assert score_chats(dispatched, tokenizer, chosen, [CHATS[0]]) == expected
    assert dispatched.model.layers[0].mlp.up_proj.weight.device.type == "meta"


def test_norm_copy_equals_the_models_own_under_a_dispatcher(model: Any, observed: Observed) -> None:
    import copy

    import torch
    from accelerate.hooks import ModelHook, add_hook_to_module

    class SendsAway(ModelHook):  # type: ignore[misc]
        """As of a norm on another GPU."""

        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError("the stream left its device")

    hooked = copy.deepcopy(model)
    add_hook_to_module(hooked.model.norm, SendsAway())
    with pytest.raises(AssertionError):
        hooked.model.norm(observed.streams[3])
    found = capture.local_norm(hooked, torch.device("cpu"))(observed.streams[3])
    assert torch.equal(found, model.model.norm(observed.streams[3]))


def test_boundary_and_bits() -> None:
    import torch

    from pytest_multigpu.records.probe import BoundaryReading

    a = torch.tensor([0.0, 1.0, float("nan")], dtype=torch.bfloat16)
    assert observe.differing(a, a.clone()) == 0
    assert observe.differing(a, torch.tensor([-0.0, 1.0, 2.0], dtype=torch.bfloat16)) == 2
    assert observe.differing(a, a.float()) == 3
    reading = BoundaryReading(layer=20, source="cuda:0", target="cuda:1", differing=7)
    record = judge.judge_boundary(reading)
    assert (record.outcome, record.device) == ("failed", "GPU 0 -> GPU 1")
    assert record.reason == "hidden_states[20] changes on its way"
    clean = dataclasses.replace(reading, differing=0)
    assert judge.judge_boundary(clean).outcome == "passed"
