"""Transcripts in JSON lines, and the table of their scores. Imports errors and this package."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .metrics import Auroc, auroc
from .probe import Probe
from .scoring import Score
from .spans import Message

_UNREAD = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
"""Parts of a message that chat templates print and that are not scored here."""


@dataclass(frozen=True, kw_only=True)
class Transcript:
    """One line: a list of messages, or an object with ``messages`` and, if it has them, ``id``
    and ``label`` (true, false, 1 or 0; true is the probe's positive class)."""

    name: str
    messages: tuple[Message, ...]
    label: bool | None = None


def read_transcripts(path: Path) -> tuple[Transcript, ...]:
    """:raises UsageError: unreadable, or a line that is no transcript; names file and line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as text; check the path") from error
    found = [
        _transcript(path, number, line) for number, line in enumerate(lines, 1) if line.strip()
    ]
    if not found:
        raise UsageError(f"{path}: holds no transcript; write one JSON object a line")
    return tuple(found)


def _transcript(path: Path, number: int, line: str) -> Transcript:
    where = f"{path}, line {number}"
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: is not valid JSON; write one object a line") from error
    fields: dict[str, Any] = value if isinstance(value, dict) else {"messages": value}
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise UsageError(f"{where}: messages: is not a list of messages")
    for message in messages:
        if not isinstance(message, dict) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise UsageError(f"{where}: messages: each needs role and content as text")
        unread = next((key for key in _UNREAD if message.get(key)), None)
        if unread is not None:
            raise UsageError(
                f"{where}: messages: {unread} would be left out of what the model read; put it "
                "into content as the game did"
            )
    label = fields.get("label")
    if label is not None and label not in (0, 1):
        raise UsageError(f"{where}: label: {label!r:.40} is not true, false, 1 or 0")
    return Transcript(
        name=str(fields.get("id", number)),
        messages=tuple({"role": m["role"], "content": m["content"]} for m in messages),
        label=None if label is None else bool(label),
    )


def table(probe: Probe, transcripts: Sequence[Transcript], scores: Sequence[Score]) -> list[str]:
    """Lines of a table; with a threshold, a verdict; with labels of both kinds, the AUROC."""
    width = max(4, *(len(t.name) for t in transcripts))
    lines = [f"{'text':<{width}}  {'score':>12}  {'tokens':>6}  label  verdict"]
    for transcript, score in zip(transcripts, scores, strict=True):
        label = "-" if transcript.label is None else str(int(transcript.label))
        verdict = "-"
        if probe.threshold is not None:
            positive = score.value > probe.threshold
            verdict = probe.positive_class if positive else f"not {probe.positive_class}"
        lines.append(
            f"{transcript.name:<{width}}  {score.value:>12.6g}  {len(score.tokens):>6}  "
            f"{label:>5}  {verdict}"
        )
    area = area_of(transcripts, scores)
    if area is not None:
        lines.append(
            f"AUROC {area.value:.3f} (95% {area.low:.3f} to {area.high:.3f}; "
            f"{area.positives} positive, {area.negatives} negative)"
        )
    return lines


def area_of(transcripts: Sequence[Transcript], scores: Sequence[Score]) -> Auroc | None:
    """AUROC over the labelled texts; None unless both labels are there."""
    pairs = [
        (score.value, transcript.label)
        for transcript, score in zip(transcripts, scores, strict=True)
        if transcript.label is not None
    ]
    if len({label for _, label in pairs}) < 2:
        return None
    return auroc([value for value, _ in pairs], [label for _, label in pairs])
