"""Which tokens are scored, by the chat template's own text."""

from __future__ import annotations

from typing import Any

import pytest

from pytest_multigpu.errors import ScoringError
from pytest_multigpu.probes.observe import CHATS, chats_for
from pytest_multigpu.probes.probe import TokenMask
from pytest_multigpu.probes.spans import long_enough, tokenize_chat


def texts(tokenizer: Any, messages: list[dict[str, str]]) -> list[str]:
    chat = tokenize_chat(tokenizer, messages)
    return [tokenizer.decode(list(chat.input_ids[start:end])) for start, end in chat.spans]


@pytest.mark.parametrize(
    ("contents", "expected"),
    [
        (["hello", "assistant", "x"], ["hello", "assistant", "x"]),
        (["user", "  padded \n", "user"], ["user", "padded", "user"]),
        (["", "a", ""], ["", "a", ""]),
        (["same", "same", "same"], ["same", "same", "same"]),
        (["naïve ☃", "日本語", "\U0001f600!"], ["naïve ☃", "日本語", "\U0001f600!"]),
        (["qzx0mark000000end", "b", "c"], ["qzx0mark000000end", "b", "c"]),
        (["<|eot_id|>", "b", "c"], ["<|eot_id|>", "b", "c"]),
    ],
)
def test_spans_decode_to_the_texts(
    tokenizer: Any, contents: list[str], expected: list[str]
) -> None:
    roles = ("system", "user", "assistant")
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
    assert texts(tokenizer, messages) == expected


def test_tokens_are_the_templates_own(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    own = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    assert list(tokenize_chat(tokenizer, messages).input_ids) == list(own)


def test_mask(tokenizer: Any) -> None:
    messages = [
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "skip"},
        {"role": "assistant", "content": "two"},
    ]
    chat = tokenize_chat(tokenizer, messages)

    def scored(rule: TokenMask) -> str:
        mask = chat.mask(rule)
        kept = [token for token, on in zip(chat.input_ids, mask, strict=True) if on]
        return str(tokenizer.decode(kept))

    assert scored(TokenMask()) == "onetwo"
    assert scored(TokenMask(left=3, right=1)) == (
        "<|end_header_id|>\n\none<|eot_id|><|end_header_id|>\n\ntwo<|eot_id|>"
    )
    assert scored(TokenMask(exclude_last=4)) == "on"
    assert scored(TokenMask(exclude_last=5)) == "o"
    assert scored(TokenMask(left=1000, right=1000)) == chat.text
    assert scored(TokenMask(roles=("user",))) == "skip"
    with pytest.raises(ScoringError) as error:
        chat.mask(TokenMask(roles=("tool",)))
    assert str(error.value) == "no token to score: the chat has no text of tool"


@pytest.mark.parametrize("exclude_last", [6, 7, 11, 65535])
def test_a_rule_that_leaves_out_every_token(tokenizer: Any, exclude_last: int) -> None:
    """One more than there are must not count from the other end."""
    chat = tokenize_chat(tokenizer, [{"role": "assistant", "content": "onetwo"}])
    with pytest.raises(ScoringError) as error:
        chat.mask(TokenMask(exclude_last=exclude_last))
    assert str(error.value) == (
        f"no token to score: the probe leaves out the last {exclude_last} tokens and the chat "
        "has 6 of assistant"
    )


def test_the_checks_chats_are_long_enough_for_the_rule(tokenizer: Any) -> None:
    chats = chats_for(tokenizer, TokenMask(exclude_last=30))
    assert [chat[-1]["content"] for chat in chats] == [
        "No, I read it in the news. No, I read it in the news.",
        "I did. I did. I did. I did. I did. I did. I did. I did.",
        CHATS[2][-1]["content"],
    ]
    assert [chat[:-1] for chat in chats] == [chat[:-1] for chat in CHATS]
    assert chats_for(tokenizer, TokenMask()) == CHATS
    # A rule that no text of reasonable length satisfies fails when it is scored.
    (chat,) = [long_enough(tokenizer, CHATS[1], TokenMask(exclude_last=65535))]
    with pytest.raises(ScoringError, match=r"^no token to score: the probe leaves out the last "):
        tokenize_chat(tokenizer, chat).mask(TokenMask(exclude_last=65535))
    assert len(tokenize_chat(tokenizer, chat).input_ids) < 4096


def test_templates_that_rewrite_are_an_error(tokenizer: Any) -> None:
    import copy

    shouting = copy.deepcopy(tokenizer)
    shouting.chat_template = "{% for m in messages %}[{{ m['content'] | upper }}]{% endfor %}"
    with pytest.raises(ScoringError) as error:
        tokenize_chat(shouting, [{"role": "user", "content": "hi"}])
    assert str(error.value) == (
        "the chat template changes the text of message 1; its tokens can't be told from the "
        "template's"
    )
    shouting.chat_template = None
    with pytest.raises(ScoringError, match=r"^the tokenizer has no chat template; set one$"):
        tokenize_chat(shouting, [{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([], "the chat is empty"),
        ([{"role": "user"}], "message 1 lacks role or content as text"),
        ([{"role": "user", "content": 5}], "message 1 lacks role or content as text"),
    ],
)
def test_damaged_chats(tokenizer: Any, messages: Any, text: str) -> None:
    with pytest.raises(ScoringError) as error:
        tokenize_chat(tokenizer, messages)
    assert str(error.value) == text
