"""Other families than Llama: read where they say, seen where they compute, or refused in words."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_families import FAMILIES, HIDDEN, family

from pytest_multigpu.errors import ScoringError
from pytest_multigpu.judging import probe as judge
from pytest_multigpu.probes import observe as observing
from pytest_multigpu.probes.alone import Alone
from pytest_multigpu.probes.capture import anatomy, forward, watching
from pytest_multigpu.probes.invariants import scored, ways
from pytest_multigpu.probes.invariants.fit import fit_of
from pytest_multigpu.probes.observe import differing, observe, read_boundaries
from pytest_multigpu.probes.synthetic import synthetic_probe

FLOAT32 = judge.shift_limits("float32", "cpu")


@pytest.mark.parametrize("kind", FAMILIES)
def test_other_families_are_read_where_they_say(tokenizer: Any, kind: str) -> None:
    model = family(kind)
    seen = observe(model, tokenizer)
    for layers in ((0,), (1, 3), (4,)):
        for site in ("raw", "final_norm"):
            probe = synthetic_probe(HIDDEN, 4, layers=layers, site=site)
            alone = Alone(model, tokenizer, probe)
            found = [
                *map(judge.judge_hook, scored.read_hooks(model, probe, seen, alone.streams(0))),
                *map(judge.judge_arithmetic, scored.read_arithmetic(model, probe, seen)),
                *map(judge.judge_plant, scored.read_plant(model, probe, seen)),
                *(judge.judge_shift(one, FLOAT32) for one in ways.read_batches(alone)),
            ]
            assert [record for record in found if record.outcome != "passed"] == []


@pytest.mark.parametrize(
    ("kind", "fields"),
    [*((kind, {}) for kind in FAMILIES), ("opt", {"word_embed_proj_dim": HIDDEN // 2})],
)
def test_a_probe_is_as_wide_as_the_stream(kind: str, fields: dict[str, int]) -> None:
    """OPT 350M's embeddings are narrower, and projected."""
    found = fit_of(synthetic_probe(HIDDEN, 4), family(kind, **fields), kind)
    assert (found.probe_hidden, found.model_hidden, found.model_layers) == (HIDDEN, HIDDEN, 4)


@pytest.mark.parametrize("kind", ["llama", *FAMILIES])
def test_what_every_block_is_given_can_be_seen(kind: str) -> None:
    """Whatever its first module is called; on one device nothing has changed on the way."""
    import torch

    model = family(kind)
    streams: dict[int, Any] = {}
    ids = torch.tensor([[5, 6, 7, 8]])
    with watching(model, range(5), streams.__setitem__):
        with observing._received(model, streams) as received:
            forward(model, ids)
        assert {layer: differing(streams[layer], x) for layer, (_, x) in received.items()} == {
            0: 0,
            1: 0,
            2: 0,
            3: 0,
        }
        # The hooks are gone.
        received.clear()
        forward(model, ids)
        assert received == {}


class Placed:
    """A tensor on a GPU that isn't there; what the host gets of it is as given."""

    def __init__(self, device: str, values: Any) -> None:
        import torch

        self.device, self.values = torch.device(device), values
        self.shape, self.dtype = values.shape, values.dtype
        self.element_size = values.element_size

    def detach(self) -> Any:
        return self.values


def boundary_outcomes(
    places: list[str], received: dict[int, tuple[str, str, float]]
) -> dict[int, str]:
    """Layer to outcome. Block i runs on ``places[i]``; ``received``: layer to the block's class,
    where it was seen, and by how much it differs from what was sent."""
    import torch

    def placed(device: str, value: float) -> Any:
        return Placed(device, torch.full((1, 2, 3), float(value)))

    # hidden_states[i + 1] is made by block i; the embedding lies with block 0.
    sent = {layer: placed(places[max(0, layer - 1)], layer) for layer in range(len(places) + 1)}
    got = {
        layer: (kind, placed(device, layer + change))
        for layer, (kind, device, change) in received.items()
    }
    devices = [torch.device(place) for place in places]
    return {
        reading.layer: judge.judge_boundary(reading).outcome
        for reading in read_boundaries(sent, got, devices)
    }


def test_boundaries_between_devices() -> None:
    places = ["cuda:0", "cuda:0", "cuda:1", "cuda:1"]
    same = {layer: ("Block", place, 0.0) for layer, place in enumerate(places)}
    assert boundary_outcomes(places, same) == {2: "passed"}
    assert boundary_outcomes(places, {**same, 2: ("Block", "cuda:1", 1.0)}) == {2: "failed"}
    assert boundary_outcomes(["cuda:0"] * 4, {}) == {}
    # The block after the boundary shows nothing, or on the wrong side of it.
    assert boundary_outcomes(places, {0: same[0], 1: same[1], 3: same[3]}) == {2: "unknown"}
    assert boundary_outcomes(places, {**same, 2: ("Block", "cuda:0", 0.0)}) == {2: "unknown"}
    assert boundary_outcomes(places, {}) == {2: "unknown"}


def test_a_class_whose_modules_get_something_else_tells_nothing() -> None:
    """Where nothing moves it differs as well: of its boundaries that is no failure."""
    places = ["cuda:0", "cuda:0", "cuda:1", "cuda:2"]
    scaled = {layer: ("Scales", place, 0.5) for layer, place in enumerate(places)}
    assert boundary_outcomes(places, scaled) == {2: "unknown", 3: "unknown"}
    mixed = {**scaled, 3: ("Block", "cuda:2", 0.5)}
    assert boundary_outcomes(places, mixed) == {2: "unknown", 3: "failed"}


def test_a_boundary_that_cannot_be_seen_is_unmeasured() -> None:
    from pytest_multigpu.records.probe import BoundaryReading

    reading = BoundaryReading(layer=20, source="cuda:0", target="cuda:1", differing=None)
    record = judge.judge_boundary(reading)
    assert (record.outcome, record.measured, record.device) == ("unknown", None, "GPU 0 -> GPU 1")
    assert record.reason == (
        "what the block after hidden_states[20] was given can't be seen in this architecture"
    )
    assert record.remedy == "pytest -m quick, for the copies between GPUs"


@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba", "rwkv"])
def test_families_whose_hidden_states_are_counted_otherwise(tokenizer: Any, kind: str) -> None:
    """``hidden_states[22]`` of theirs is block 23's output: the scorer would read block 22's."""
    import torch

    model = family(kind)
    ids = torch.tensor([[5, 6, 7]])
    output = model(ids, output_hidden_states=True)
    blocks = getattr(model.get_decoder(), "layers", None) or model.get_decoder().blocks
    first: list[Any] = []
    blocks[0].register_forward_hook(lambda _m, _a, out: first.append(out))
    model(ids)
    made = first[0][0] if isinstance(first[0], tuple) else first[0]
    assert torch.equal(output.hidden_states[0], made)
    with pytest.raises(ScoringError) as error:
        observe(model, tokenizer)
    assert str(error.value) == (
        f"{type(model).__name__}'s hidden_states begin after the first block, so that a layer's "
        "index means another place; probes can't read it"
    )


def test_families_without_a_final_norm() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("openai-gpt", n_embd=HIDDEN, n_layer=2, n_head=4, vocab_size=300)
    with pytest.raises(
        ScoringError, match=r"^OpenAIGPTLMHeadModel has none of norm, .*; probes can't read it$"
    ):
        anatomy(AutoModelForCausalLM.from_config(config))
