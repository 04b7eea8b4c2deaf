"""Attempts to get a wrong score past the scorer or its checks; each is an error or a red record."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pytest_multigpu.errors import ScoringError, UsageError
from pytest_multigpu.judging import probe as judge
from pytest_multigpu.probes import scoring
from pytest_multigpu.probes.alone import Alone
from pytest_multigpu.probes.invariants import fit, scored, ways
from pytest_multigpu.probes.observe import CHATS, Observed, chats_for, observe
from pytest_multigpu.probes.probe import Probe
from pytest_multigpu.probes.scoring import context_of, score_chats, score_tokens
from pytest_multigpu.probes.spans import tokenize_chat
from pytest_multigpu.probes.synthetic import synthetic_probe
from pytest_multigpu.probes.transcripts import read_transcripts

HIDDEN, LAYERS = 64, 6
FLOAT32 = judge.shift_limits("float32", "cpu")


# Chat templates

TEMPLATES = {
    "reorders": "{% for m in messages|reverse %}<{{ m.role }}>{{ m.content }}{% endfor %}",
    "drops one": "{% for m in messages if m.role != 'system' %}{{ m.content }};{% endfor %}",
    "prints twice": "{% for m in messages %}{{ m.content }}|{{ m.content }};{% endfor %}",
    "cuts": "{% for m in messages %}<{{ m.role }}>{{ m.content[:5] }}{% endfor %}",
    "counts": "{% for m in messages %}{{ m.content|length }}:{{ m.content }};{% endfor %}",
    "replaces": "{% for m in messages %}{{ m.content|replace('a', 'b') }};{% endfor %}",
    "last alone": "<{{ messages[-1].role }}>{{ messages[-1].content }}",
    "capitalises": "{% for m in messages %}<{{ m.role }}>{{ m.content|capitalize }};{% endfor %}",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_that_rewrite_texts(tokenizer: Any, template: str) -> None:
    other = copy.deepcopy(tokenizer)
    other.chat_template = TEMPLATES[template]
    contents = ("the rules say a", "ask about a", "an answer")
    roles = ("system", "user", "assistant")
    chat = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
    with pytest.raises(ScoringError, match=r"^the chat template changes the text of message \d; "):
        tokenize_chat(other, chat)


@pytest.mark.parametrize(
    ("template", "bad", "good"),
    [
        ("{{ m.content.split('</think>')[-1] }}", "<think>lie</think>no", "no"),
        ("{% if 'secret' in m.content %}!!{% endif %}{{ m.content }}", "a secret", "nothing"),
        ("{{ m.content|e }}", "a < b", "a, b"),
        ("{{ m.content.lstrip() }};", " a ", "a "),
    ],
)
def test_templates_that_depend_on_the_text(
    tokenizer: Any, template: str, bad: str, good: str
) -> None:
    """What a mark would not show is an error; what the template leaves alone is found."""
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{% for m in messages %}<{{ m.role }}>" + template + "{% endfor %}"
    with pytest.raises(ScoringError, match=r"^the chat template changes the text of message 1; "):
        tokenize_chat(other, [{"role": "assistant", "content": bad}])
    chat = tokenize_chat(other, [{"role": "assistant", "content": good}])
    ((start, end),) = chat.spans
    assert other.decode(list(chat.input_ids[start:end])) == good


def test_a_template_without_system_messages_can_be_checked(
    model: Any, tokenizer: Any, probe: Probe
) -> None:
    """As Gemma 2's: the checks' own chat must not be what fails."""
    other = copy.deepcopy(tokenizer)
    refuse = "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    other.chat_template = (
        "{% for m in messages %}" + refuse + "<{{ m.role }}>{{ m.content }};{% endfor %}"
    )
    assert chats_for(tokenizer) == CHATS
    assert chats_for(other)[0] == CHATS[0][1:]
    alone = Alone(model, other, probe)
    seen = observe(model, other)
    (hook,) = scored.read_hooks(model, probe, seen, alone.streams(0))
    assert judge.judge_hook(hook).outcome == "passed"
    assert (
        judge.judge_span(scored.read_span(other, probe, seen, alone.score(0))).outcome == "passed"
    )


# Tokenizers


def byte_level(*, trim: bool, merges: bool = True) -> Any:
    """A trained byte-level BPE, which trims offsets or does not, under a ChatML-like template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=trim)
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["the cat sat.  two  spaces\n\nnew line   three\n"] * 20, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=False)
    wrapped.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    return wrapped


CONTENTS = (
    "the cat",
    "  two  spaces  ",
    " x",
    "x ",
    "\nnew line\n",
    "e\u0301 n\u0303",
    "日本",
    "",
    " ",
)


@pytest.mark.parametrize("trim", [False, True])
def test_spaces_at_the_edge_of_a_text_belong_to_it(trim: bool) -> None:
    """Trimmed offsets say of a token of spaces that it stands for nothing."""
    made = byte_level(trim=trim)
    for asked, answer in itertools.product(CONTENTS, CONTENTS):
        chat = tokenize_chat(
            made, [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        )
        found = [made.decode(list(chat.input_ids[start:end])) for start, end in chat.spans]
        assert found == [asked, answer]


def test_a_tokenizer_without_offsets(tokenizer: Any) -> None:
    class Slow:
        chat_template = tokenizer.chat_template
        apply_chat_template = tokenizer.apply_chat_template

        def __call__(self, *_: Any, **__: Any) -> Any:
            raise NotImplementedError("return_offset_mapping is not available")

    with pytest.raises(ScoringError) as error:
        tokenize_chat(Slow(), CHATS[0])
    assert str(error.value) == (
        "Slow does not tell which characters a token stands for; use a fast tokenizer"
    )


def test_half_a_surrogate_pair(tokenizer: Any) -> None:
    with pytest.raises(ScoringError, match=r"^the chat can't be tokenised: TypeError: "):
        tokenize_chat(tokenizer, [{"role": "assistant", "content": "\ud800"}])


def test_tokens_that_the_model_lacks(model: Any, tokenizer: Any, probe: Probe) -> None:
    """A GPU would end the whole process's CUDA over it."""
    known = model.config.vocab_size
    for bad in (known, -1):
        with pytest.raises(ScoringError) as error:
            score_tokens(model, probe, [[5, bad]], [[True, True]])
        assert str(error.value) == (
            f"token {bad} is none of the model's {known}; use the model's own tokenizer"
        )
    assert score_tokens(model, probe, [[5, known - 1]], [[True, True]])[0].tokens


def test_a_text_beyond_the_model_s_context(model: Any, probe: Probe) -> None:
    """It would be scored at positions that the model was never trained for."""
    context = model.config.max_position_embeddings
    row = [5] * (context + 1)
    with pytest.raises(ScoringError) as error:
        score_tokens(model, probe, [row], [[True] * len(row)])
    assert str(error.value) == (
        "a text of 513 tokens is longer than the model's context of 512; shorten it"
    )
    assert score_tokens(model, probe, [row[1:]], [[True] * context])


@pytest.mark.parametrize(
    ("fields", "context"),
    [
        ({"max_position_embeddings": 512}, 512),
        ({"max_position_embeddings": None}, None),
        # YaRN as Qwen has it: the factor is on top of the context.
        ({"max_position_embeddings": 32, "rope_parameters": {"factor": 4.0}}, 128),
        # As Llama 3.1 has it: the context is what it is.
        (
            {
                "max_position_embeddings": 131072,
                "rope_parameters": {"factor": 8.0, "original_max_position_embeddings": 8192},
            },
            131072,
        ),
        (
            {
                "max_position_embeddings": 32,
                "rope_parameters": {"full_attention": {"factor": 2}, "sliding_attention": {}},
            },
            64,
        ),
    ],
)
def test_contexts(fields: dict[str, Any], context: int | None) -> None:
    from types import SimpleNamespace

    text = SimpleNamespace(**fields)
    config = SimpleNamespace(get_text_config=lambda decoder: text)
    assert context_of(config) == context


# Batches


def test_another_number_of_masks_than_rows(model: Any, probe: Probe) -> None:
    for masks in ([], [[True]], [[True]] * 3):
        with pytest.raises(ScoringError, match=r"^\d masks for 2 rows of tokens$"):
            score_tokens(model, probe, [[5], [6]], masks)


def family(kind: str, **fields: Any) -> Any:
    """A tiny float32 model of another family with four blocks."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(0)
    common = {"vocab_size": 300, "initializer_range": 0.3, "pad_token_id": 0}
    if kind in ("gpt2", "bloom"):
        common |= {"n_embd": HIDDEN, "hidden_size": HIDDEN, "n_layer": 4, "n_head": 4}
    else:
        common |= {
            "hidden_size": HIDDEN,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 512,
        }
    config = AutoConfig.for_model(kind, **common, **fields)
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(False)
        if "norm" in name or "ln_" in name:
            parameter.add_(torch.rand_like(parameter) * 0.3)
    return made


FAMILIES = {
    "mistral": {"sliding_window": 8},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 16},
    "gpt2": {},
    "bloom": {},
    "gpt_neox": {},
}
"""Sliding windows; embeddings scaled, or with positions or a norm before the first block; another
name for every part."""


@pytest.mark.parametrize("kind", FAMILIES)
def test_other_families_are_read_where_they_say(tokenizer: Any, kind: str) -> None:
    model = family(kind, **FAMILIES[kind])
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


@pytest.mark.parametrize("kind", ["mistral", "gpt2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rows_of_very_different_lengths(kind: str, attention: str) -> None:
    """On either side a row of one token beside one of 300: queries that see padding alone."""
    model = family(kind, **FAMILIES[kind], attn_implementation=attention)
    probe = synthetic_probe(HIDDEN, 4, layers=(3,))
    rng = np.random.default_rng(0)
    rows = [rng.integers(3, 250, length).tolist() for length in (1, 300, 7, 2)]
    masks = [[True] * len(row) for row in rows]
    alone = [score_tokens(model, probe, [r], [m])[0] for r, m in zip(rows, masks, strict=True)]
    for side in ("left", "right"):
        batch = score_tokens(model, probe, rows, masks, padding_side=side)
        assert (
            judge.judge_shift(ways.shift_between(side, alone, batch), FLOAT32).outcome == "passed"
        )


# Probes


def test_one_bad_layer_of_two_is_named(model: Any, tokenizer: Any, observed: Observed) -> None:
    two = synthetic_probe(HIDDEN, LAYERS, layers=(1, 4))
    fitted = fit.with_scaler(Alone(model, tokenizer, two))
    assert judge.judge_size(fit.read_sizes(model, fitted, observed)).outcome == "passed"
    assert fitted.mean is not None
    assert fitted.scale is not None
    tenth = dataclasses.replace(
        fitted,
        mean=(fitted.mean[0], fitted.mean[1] / 10),
        scale=(fitted.scale[0], fitted.scale[1] / 10),
    )
    record = judge.judge_size(fit.read_sizes(model, tenth, observed))
    assert record.outcome == "failed"
    assert record.reason.startswith("activations at layer 4, site raw, are ")
    # Of that layer, not of the good one.
    assert isinstance(record.measured, float)
    assert record.measured > 50


def test_layers_that_are_exchanged(
    model: Any, tokenizer: Any, observed: Observed, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pytest_multigpu.probes import capture

    real = capture.capture

    def exchanged(*arguments: Any, **options: Any) -> Any:
        found = real(*arguments, **options)
        return dict(zip(found, reversed(list(found.values())), strict=True))

    monkeypatch.setattr(scoring, "capture", exchanged)
    two = synthetic_probe(HIDDEN, LAYERS, layers=(1, 4))
    alone = Alone(model, tokenizer, two)
    found = [judge.judge_hook(r) for r in scored.read_hooks(model, two, observed, alone.streams(0))]
    assert [record.outcome for record in found] == ["failed", "failed"]


def test_a_site_that_nothing_tells_is_a_warning() -> None:
    record = judge.judge_site("final_norm")
    assert record.outcome == "warned"
    assert record.reason == (
        "the probe has no scaler, so nothing tells whether its layer and site are right"
    )


@pytest.mark.parametrize(
    ("fields", "scale"),
    [
        ({}, 1e-50),
        ({}, 1e40),
        ({"mean": 1e39, "scale": 1.0}, 1.0),
        ({"mean": 0, "scale": 1e-40}, 1),
    ],
)
def test_vectors_that_float32_cannot_hold(
    model: Any, tokenizer: Any, probe: Probe, fields: dict[str, float], scale: float
) -> None:
    """All scores would be the bias, or infinite."""
    vectors: dict[str, Any] = {k: (np.full(HIDDEN, float(v)),) for k, v in fields.items()}
    extreme = dataclasses.replace(
        probe, directions=(probe.directions[0] * scale,), normalize=bool(fields), **vectors
    )
    with pytest.raises(ScoringError) as error:
        score_chats(model, tokenizer, extreme, CHATS[:1])
    assert str(error.value) == "the probe has values that float32 can't hold; scale them"


def test_float16_overflow_is_no_score(make_llama: Any, tokenizer: Any, probe: Probe) -> None:
    model = make_llama(dtype="float16")
    model.model.layers[1].mlp.down_proj.weight.mul_(1e4)
    for site in ("raw", "final_norm"):
        chosen = dataclasses.replace(probe, site=site)
        with pytest.raises(ScoringError, match=r"is (nan|-?inf), not a number to use$"):
            score_chats(model, tokenizer, chosen, CHATS[:1])


@pytest.mark.parametrize(
    ("probe_model", "model_name", "outcome"),
    [
        # Points are not dropped between digits.
        ("facebook/opt-1.3b", "facebook/opt-13b", "failed"),
        # An empty or tiny name is part of everything.
        ("meta-llama/Llama-3.3-70B-Instruct", "models/", "failed"),
        ("meta-llama/Llama-3.3-70B-Instruct", "./", "warned"),
        ("meta-llama/Llama-3.3-70B-Instruct", "b", "failed"),
        ("", "llama-3.3-70b", "failed"),
        # Fine-tunes score otherwise; another storage does not.
        ("meta-llama/Llama-3.3-70B-Instruct", "acme/Llama-3.3-70B-Instruct-abliterated", "warned"),
        ("meta-llama/Llama-3.3-70B-Instruct", "acme/Llama-3.3-70B-Instruct-bnb-4bit", "passed"),
        ("meta-llama/Llama-3.3-70B-Instruct", "Llama-3_3-70B", "failed"),
        (
            "meta-llama/Llama-3.3-70B-Instruct",
            "/cache/models--meta-llama--Llama-3.3-70B-Instruct/snapshots/0a1b",
            "passed",
        ),
        ("meta-llama/Llama-3.3-70B-Instruct", "/models/Llama-3.3-70B-Instruct/", "passed"),
        ("gpt2", "gpt2-medium", "warned"),
    ],
)
def test_model_names_that_look_alike(probe_model: str, model_name: str, outcome: str) -> None:
    from pytest_multigpu.records.probe import ProbeFit

    found = ProbeFit(
        probe_hidden=8,
        model_hidden=8,
        probe_layers=(1,),
        model_layers=2,
        probe_model=probe_model,
        model=model_name,
    )
    assert judge.judge_fit(found)[2].outcome == outcome


# Transcripts


@pytest.mark.parametrize("key", ["tool_calls", "reasoning_content", "thinking"])
def test_parts_of_a_message_that_would_be_left_out(tmp_path: Path, key: str) -> None:
    path = tmp_path / "t.jsonl"
    message = {"role": "assistant", "content": "x", "seconds": 1.5}
    path.write_text(json.dumps([{**message, key: ["something"]}]))
    with pytest.raises(UsageError) as error:
        read_transcripts(path)
    assert str(error.value) == (
        f"{path}, line 1: messages: {key} would be left out of what the model read; put it into "
        "content as the game did"
    )
    path.write_text(json.dumps([{**message, key: None}]))
    assert len(read_transcripts(path)) == 1
