"""What the readings share: a forward a chat, and a generation that somebody else runs."""

from __future__ import annotations

from typing import Any

import pytest

from pytest_multigpu.errors import ProbeFileError, ScoringError
from pytest_multigpu.probes import capture, scoring
from pytest_multigpu.probes.alone import Alone
from pytest_multigpu.probes.observe import CHATS
from pytest_multigpu.probes.probe import Probe
from pytest_multigpu.probes.scoring import score_chats
from pytest_multigpu.probes.synthetic import synthetic_probe
from pytest_multigpu.probes.witness import Witness

HIDDEN, LAYERS = 64, 6


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each forward of the scorer."""
    made: list[int] = []
    real = capture.capture

    def counted(*arguments: Any, **options: Any) -> Any:
        made.append(1)
        return real(*arguments, **options)

    monkeypatch.setattr(scoring, "capture", counted)
    return made


def test_a_forward_a_chat(model: Any, tokenizer: Any, probe: Probe, forwards: list[int]) -> None:
    alone = Alone(model, tokenizer, probe)
    assert forwards == []
    streams = alone.streams(1)
    assert {layer: tuple(x.shape) for layer, x in streams.items()} == {
        3: (1, len(alone.chat(1).input_ids), HIDDEN)
    }
    assert alone.scores()[1] == alone.score(1)
    assert len(forwards) == len(CHATS)
    assert tuple(alone.scores()) == score_chats(model, tokenizer, probe, CHATS)


def test_a_failed_score_leaves_the_activations_and_fails_each_time(
    model: Any, tokenizer: Any, probe: Probe, forwards: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("boom")

    monkeypatch.setattr(scoring, "_layer_scores", broken)
    alone = Alone(model, tokenizer, probe)
    assert alone.streams(0)[3].shape[-1] == HIDDEN
    for _ in range(2):
        with pytest.raises(ScoringError, match=r"^scoring failed: RuntimeError: boom$"):
            alone.score(0)
    assert len(forwards) == 1


def test_a_failed_forward_has_neither(model: Any, tokenizer: Any) -> None:
    alone = Alone(model, tokenizer, synthetic_probe(HIDDEN, 80, layers=(22,)))
    for ask in (alone.streams, alone.score):
        with pytest.raises(ScoringError, match=r"^layer 22 is out of range"):
            ask(0)


def hooks(model: Any) -> list[int]:
    """transformers leaves some of its own."""
    return [len(module._forward_hooks) for module in model.modules()]


def generate(model: Any) -> None:
    import torch

    ids = torch.tensor([[256, 65, 66]])
    model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, pad_token_id=0
    )


def test_a_witness_sees_every_forward_and_leaves_no_hook(model: Any) -> None:
    probe = synthetic_probe(HIDDEN, LAYERS, layers=(0, 3))
    before = hooks(model)
    with Witness(model, lambda: probe) as witness:
        generate(model)
    assert {layer: tuple(x.shape) for layer, x in witness.streams().items()} == {
        0: (1, 6, HIDDEN),
        3: (1, 6, HIDDEN),
    }
    assert hooks(model) == before


def test_a_probe_that_does_not_fit_disturbs_nothing(model: Any) -> None:
    deep = synthetic_probe(HIDDEN, 80, layers=(2, 22))
    before = hooks(model)
    with Witness(model, lambda: deep) as witness:
        generate(model)
    with pytest.raises(ScoringError, match=r"^layer 22 is out of range"):
        witness.streams()
    assert hooks(model) == before


def test_a_probe_that_cannot_be_read_disturbs_nothing(model: Any) -> None:
    def damaged() -> Probe:
        raise ProbeFileError("detector.pt: is empty; copy it again")

    with Witness(model, damaged) as witness:
        generate(model)
    with pytest.raises(ProbeFileError, match=r"^detector\.pt: is empty"):
        witness.streams()


def test_outputs_that_are_no_stream_disturb_nothing(model: Any, probe: Probe) -> None:
    with Witness(model, lambda: probe) as witness:
        # As a block of another architecture might.
        for handed in ("nothing", ("text", None)):
            witness._note(3, handed)
    with pytest.raises(ScoringError, match=r"^hidden_states\[3\] is str, not"):
        witness.streams()


def test_a_generation_that_failed_was_not_watched(model: Any, probe: Probe) -> None:
    witness = Witness(model, lambda: probe)
    with pytest.raises(RuntimeError, match="out of memory"), witness:
        raise RuntimeError("out of memory")
    with pytest.raises(ScoringError, match=r"^nothing was watched: the generation failed$"):
        witness.streams()


def test_a_layer_that_never_ran(model: Any, probe: Probe) -> None:
    with Witness(model, lambda: probe) as witness:
        pass
    with pytest.raises(ScoringError, match=r"^the hook on hidden_states\[3\] never ran"):
        witness.streams()
