"""Other families than Llama: read where they say, seen where they compute, or refused in words."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_families import FAMILIES, HIDDEN, family

from pytest_multigpu.errors import ScoringError
from pytest_multigpu.judging import probe as judge
from pytest_multigpu.probes.alone import Alone
from pytest_multigpu.probes.capture import anatomy
from pytest_multigpu.probes.invariants import scored, ways
from pytest_multigpu.probes.observe import observe
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
