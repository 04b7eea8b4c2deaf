"""Scores of the text set by one probe, and the difference between two such sets of scores.

Imports the other modules of this package, records and errors; numpy inside functions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import ScoringError
from ..records.drift import DriftReading
from .metrics import spearman
from .scoring import score_tokens
from .spans import tokenize_chat
from .textset import DAY, MAX_TOKENS, TEXTS

if TYPE_CHECKING:
    from .probe import Probe
    from .spans import Message


def score_texts(
    model: Any,
    tokenizer: Any,
    probe: Probe,
    texts: Sequence[Sequence[Message]] = TEXTS,
    *,
    max_tokens: int = MAX_TOKENS,
) -> tuple[tuple[float, ...], str]:
    """Every text's score, in batches that leave the forward at the probe's last layer.

    :param max_tokens: of one batch, padding included; a single longer text goes alone.
    :returns: the scores in order, and a digest of the token ids, of which are scored, and of the
        batches: int8 rounds by the whole batch.
    :raises ScoringError: a text that can't be scored; never a default score.
    """
    chats = [tokenize_chat(tokenizer, text, date_string=DAY) for text in texts]
    rows = [chat.input_ids for chat in chats]
    masks = [chat.mask(probe.mask) for chat in chats]
    values: list[float] = []
    batches = _batches([len(row) for row in rows], max_tokens)
    for first, last in batches:
        scores = score_tokens(model, probe, rows[first:last], masks[first:last])
        values += [score.value for score in scores]
    content = json.dumps([rows, masks, batches], separators=(",", ":"))
    return tuple(values), hashlib.sha256(content.encode()).hexdigest()[:16]


def _batches(lengths: Sequence[int], max_tokens: int) -> list[tuple[int, int]]:
    """First and one past the last of each batch, in order."""
    batches, first, longest = [], 0, 0
    for index, length in enumerate(lengths):
        longest = max(longest, length)
        if index > first and longest * (index - first + 1) > max_tokens:
            batches.append((first, index))
            first, longest = index, length
    return [*batches, (first, len(lengths))] if lengths else []


def drift_between(base: Sequence[float], other: Sequence[float]) -> DriftReading:
    """How ``other`` differs from ``base``, both one score a text in the same order.

    :raises ScoringError: other counts, fewer than three texts, one that is not finite, or scores
        that are all the same.
    """
    import numpy as np

    a, b = np.asarray(base, np.float64), np.asarray(other, np.float64)
    if a.shape != b.shape:
        raise ScoringError(f"{len(b)} scores can't be compared with {len(a)}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ScoringError("a score is not finite")
    correlation = spearman(base, other)
    deviation = float(a.std())
    if deviation == 0:
        raise ScoringError("scores that are all the same can't be compared")
    changes = (b - a) / deviation
    return DriftReading(
        texts=len(a),
        rank_correlation=correlation,
        shift=float(changes.mean()),
        spread=float(changes.std()),
        scale=float(b.std()) / deviation,
        largest=float(np.abs(changes).max()),
        equal=a.tobytes() == b.tobytes(),
    )
