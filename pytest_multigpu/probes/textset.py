"""The fixed texts whose scores tell how tiers, machines and versions move a probe.

Short dialogues that are much alike, so that their scores lie close together and a drift shows;
each role's texts differ, whichever a probe reads. Imports :mod:`.spans`.
"""

from __future__ import annotations

import hashlib
import json

from .spans import Message

NAME = "alibi-60"
MAX_TOKENS = 1024
"""In one forward, padding included: a few forwards score the whole set."""

DAY = "26 Jul 2024"
"""Llama's chat templates print a day, some of them today's: the set must be the same tomorrow."""

_QUESTIONS = (
    "Where were you when it happened?",
    "Did you see who took it?",
    "What did you do that evening?",
    "How did you come to know of it?",
)
_OPENINGS = ("I was at home", "I know nothing of it", "She gave it to me", "We met by chance")
_MIDDLES = ("all evening", "as I said", "and left soon", "in the harbour", "before the storm")
_ENDS = ("with my brother.", "alone.", "for an hour.")

_ANSWERS = [
    f"{opening} {middle} {end}" for opening in _OPENINGS for middle in _MIDDLES for end in _ENDS
]
TEXTS: tuple[tuple[Message, ...], ...] = tuple(
    (
        {"role": "user", "content": _QUESTIONS[number % len(_QUESTIONS)]},
        {"role": "assistant", "content": answer},
    )
    for number, answer in enumerate(_ANSWERS)
)
"""60 dialogues."""


def text_set() -> str:
    """``alibi-60 1a2b3c4d``: the set's name and the digest of its texts."""
    content = json.dumps(TEXTS, sort_keys=True)
    return f"{NAME} {hashlib.sha256(content.encode()).hexdigest()[:8]}"
