from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_multigpu.model.tokenizer import SPECIAL_TOKENS, built_in_tokenizer, tokenizer_for

TOKENIZER = built_in_tokenizer()


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60))
def test_every_text_survives(text: str) -> None:
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    if not any(token in text for token in SPECIAL_TOKENS):
        assert len(ids) == len(text.encode())
    assert TOKENIZER.decode(ids) == text


def test_ids_fit_into_512_and_the_pieces_are_where_they_should_be() -> None:
    assert len(TOKENIZER) == 262
    assert TOKENIZER.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(256, 262))
    assert (TOKENIZER.bos_token_id, TOKENIZER.eos_token_id, TOKENIZER.pad_token_id) == (
        256,
        260,
        261,
    )
    assert TOKENIZER("a")["input_ids"][0] == 256


def test_offsets_count_characters() -> None:
    encoded = TOKENIZER("né!", return_offsets_mapping=True, add_special_tokens=False)
    assert encoded["offset_mapping"] == [(0, 1), (1, 2), (1, 2), (2, 3)]
    spaced = TOKENIZER("a  b", return_offsets_mapping=True, add_special_tokens=False)
    assert spaced["offset_mapping"] == [(0, 1), (1, 2), (2, 3), (3, 4)]


def test_the_chat_template_is_llama_3s() -> None:
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " Hello "},
        {"role": "assistant", "content": "Hi."},
    ]
    text = TOKENIZER.apply_chat_template(chat, tokenize=False)
    assert text == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHi.<|eot_id|>"
    )
    prompt = TOKENIZER.apply_chat_template(chat[:2], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt)
    ids = TOKENIZER.apply_chat_template(chat, return_dict=True)["input_ids"]
    assert ids.count(TOKENIZER.bos_token_id) == 1
    assert TOKENIZER.decode(ids) == text


def test_padding_is_on_the_left() -> None:
    batch = TOKENIZER(["a", "abc"], padding=True)
    assert batch["input_ids"][0][:2] == [261, 261]
    assert batch["attention_mask"][0] == [0, 0, 1, 1]


def test_a_checkpoint_with_a_tokenizer(written: Path) -> None:
    tokenizer, note = tokenizer_for(written, 512)
    assert note is None
    assert tokenizer.chat_template == TOKENIZER.chat_template
    assert tokenizer("é!")["input_ids"] == TOKENIZER("é!")["input_ids"]


def test_a_checkpoint_without_or_with_a_broken_one(tmp_path: Path) -> None:
    tokenizer, note = tokenizer_for(tmp_path, 512, 4096)
    assert note == ("the checkpoint has no tokenizer; the built-in byte-level tokenizer stands in")
    assert tokenizer.model_max_length == 4096
    (tmp_path / "tokenizer.json").write_text("{")
    tokenizer, note = tokenizer_for(tmp_path, 512)
    assert note is not None
    assert note.startswith("the checkpoint's tokenizer could not be loaded (")
    assert note.endswith("the built-in byte-level tokenizer stands in")


def test_a_vocabulary_that_is_too_small() -> None:
    assert tokenizer_for(None, 262)[1] is None
    with pytest.raises(ValueError, match="a vocabulary of 261 tokens is too small"):
        tokenizer_for(None, 261)
