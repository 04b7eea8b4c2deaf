"""Which tokens of a chat belong to which message, by the chat template's own text.

Each message's text is replaced by a mark, the template is rendered, and the marks tell the glue
between messages; the glue and the texts must rebuild the real rendering exactly. So the text
"assistant" is never taken for the word in a role header. Imports :mod:`.probe`, errors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ScoringError, first_line
from .probe import TokenMask

Message = Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A rendered and tokenised chat."""

    text: str
    input_ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    """First and one past the last token of each message's text; empty where they are equal."""
    roles: tuple[str, ...]

    def mask(self, rule: TokenMask) -> tuple[bool, ...]:
        """Which tokens a probe scores.

        :raises ScoringError: none is left.
        """
        picked = [False] * len(self.input_ids)
        for role, (start, end) in zip(self.roles, self.spans, strict=True):
            if role in rule.roles:
                last = min(len(picked), end + rule.right)
                for token in range(max(0, start - rule.left), last):
                    picked[token] = True
        chosen = [index for index, on in enumerate(picked) if on]
        kept = chosen[: len(chosen) - rule.exclude_last]
        if not kept:
            roles = ", ".join(rule.roles)
            raise ScoringError(f"no token to score: the chat has no text of {roles}")
        for index in set(chosen) - set(kept):
            picked[index] = False
        return tuple(picked)


def tokenize_chat(tokenizer: Any, messages: Sequence[Message], **variables: Any) -> Chat:
    """Renders and tokenises ``messages`` (``role``, ``content``) with the tokenizer's template.

    :param variables: more for the template: ``date_string`` is the day that Llama's print.
    :raises ScoringError: no template, a slow tokenizer, or a template that rewrites the texts.
    """
    for number, message in enumerate(messages, 1):
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise ScoringError(f"message {number} lacks role or content as text")
    if not messages:
        raise ScoringError("the chat is empty")
    if getattr(tokenizer, "chat_template", None) is None:
        raise ScoringError("the tokenizer has no chat template; set one")
    text = _render(tokenizer, messages, variables)
    places = _locate(tokenizer, messages, text, variables)
    input_ids, offsets = _encode(tokenizer, text)
    return Chat(
        text=text,
        input_ids=input_ids,
        spans=tuple(_tokens(offsets, *place) for place in places),
        roles=tuple(message["role"] for message in messages),
    )


def _render(tokenizer: Any, messages: Sequence[Message], variables: Mapping[str, Any]) -> str:
    try:
        rendered = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=False,
            add_generation_prompt=False,
            **variables,
        )
    except Exception as error:  # Templates raise their own errors about roles and order.
        raise ScoringError(f"the chat template refused the messages: {error}") from error
    return str(rendered)


def _encode(tokenizer: Any, text: str) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
    """Token ids, and the characters that each token stands for."""
    try:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    except NotImplementedError as error:
        kind = type(tokenizer).__name__
        raise ScoringError(
            f"{kind} does not tell which characters a token stands for; use a fast tokenizer"
        ) from error
    except Exception as error:  # half of a surrogate pair, say: no UTF-8
        text = f"{type(error).__name__}: {first_line(error)}"
        raise ScoringError(f"the chat can't be tokenised: {text}") from error
    offsets, covered = [], 0
    for start, stop in encoded["offset_mapping"]:
        # Many tokenizers trim offsets: a token of spaces alone then stands for nothing.
        offsets.append((start if start < stop else min(covered, start), stop))
        covered = max(covered, stop)
    return tuple(encoded["input_ids"]), offsets


def _locate(
    tokenizer: Any, messages: Sequence[Message], text: str, variables: Mapping[str, Any]
) -> list[tuple[int, int]]:
    """Character range of each message's text in the rendering."""
    contents = "".join(message["content"] for message in messages)
    mark = next(f"qzx{n}mark" for n in range(len(contents) + 1) if f"qzx{n}mark" not in contents)
    marks = [f"{mark}{number:06d}end" for number in range(len(messages))]
    rest = _render(
        tokenizer,
        [{**message, "content": name} for message, name in zip(messages, marks, strict=True)],
        variables,
    )
    at, places = 0, []
    for number, (message, name) in enumerate(zip(messages, marks, strict=True), 1):
        glue, found, rest = rest.partition(name)
        content = message["content"]
        shown = next((t for t in (content, content.strip()) if text.startswith(glue + t, at)), None)
        # The untrimmed text may match by chance where the template trims: look ahead one glue.
        following = rest.partition(marks[number])[0] if number < len(marks) else rest
        if shown is not None and not text.startswith(glue + shown + following, at):
            shown = content.strip()
        if not found or shown is None or not text.startswith(glue + shown + following, at):
            raise ScoringError(
                f"the chat template changes the text of message {number}; "
                "its tokens can't be told from the template's"
            )
        start = at + len(glue)
        places.append((start, start + len(shown)))
        at = start + len(shown)
    return places


def _tokens(offsets: Sequence[tuple[int, int]], start: int, end: int) -> tuple[int, int]:
    """Tokens that overlap ``[start, end)``; for an empty text, the place where it would be."""
    first = next((i for i, (_, stop) in enumerate(offsets) if stop > start), len(offsets))
    if start == end:
        return first, first
    past = next((i for i in range(first, len(offsets)) if offsets[i][0] >= end), len(offsets))
    return first, past
