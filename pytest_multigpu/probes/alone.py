"""Each short chat scored by itself, once: what the readings of this probe share.

Imports the other modules of this package and errors; torch for types only.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..errors import ScoringError
from .observe import chats_for
from .probe import Probe
from .scoring import Score, score_chats
from .spans import Chat, Message, tokenize_chat

if TYPE_CHECKING:
    import torch


class Alone:
    """Scores of :func:`.observe.chats_for`, one at a time, through the scorer's own path: a
    forward a chat, made when it is first asked for. What failed is raised for whoever needs it.

    Not thread-safe.
    """

    def __init__(self, model: Any, tokenizer: Any, probe: Probe) -> None:
        self.model, self.tokenizer, self.probe = model, tokenizer, probe
        self._streams: dict[int, dict[int, torch.Tensor]] = {}
        self._scores: dict[int, Score | ScoringError] = {}

    @cached_property
    def _chats(self) -> tuple[tuple[Message, ...], ...]:
        return chats_for(self.tokenizer)

    def chat(self, number: int) -> Chat:
        """A chat's tokens, as the scorer makes them."""
        return tokenize_chat(self.tokenizer, self._chats[number])

    def streams(self, number: int) -> dict[int, torch.Tensor]:
        """The activations that a chat's score is made of: layer to ``(1, tokens, hidden)``, before
        the site, each on its own device. They are there even if the score could not be had.

        :raises ScoringError: the forward failed.
        """
        self._run(number)
        if number not in self._streams:
            self.score(number)
        return self._streams[number]

    def score(self, number: int) -> Score:
        """:raises ScoringError: the chat could not be scored."""
        self._run(number)
        found = self._scores[number]
        if isinstance(found, ScoringError):
            raise found
        return found

    def scores(self) -> list[Score]:
        """Of all chats, in order."""
        return [self.score(number) for number in range(len(self._chats))]

    def _run(self, number: int) -> None:
        if number in self._scores:
            return

        def see(streams: dict[int, torch.Tensor]) -> None:
            self._streams[number] = streams

        try:
            (self._scores[number],) = score_chats(
                self.model, self.tokenizer, self.probe, [self._chats[number]], see=see
            )
        except ScoringError as error:
            # Without its frames, which would keep tensors.
            self._scores[number] = error.with_traceback(None)
