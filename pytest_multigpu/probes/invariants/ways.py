"""The same text scored in other ways: in batches, after generation, by way of the host.

Imports the other modules of :mod:`pytest_multigpu.probes`, records and errors; torch and numpy
inside functions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ...errors import ScoringError
from ...records.probe import ShiftReading
from ..alone import Alone
from ..capture import anatomy, at_site, capture, runs_on
from ..probe import Probe
from ..scoring import Score, score_activations, score_tokens

if TYPE_CHECKING:
    import torch


def read_batches(alone: Alone) -> list[ShiftReading]:
    """Three chats of different lengths, one at a time and as one batch padded on either side."""
    model, probe = alone.model, alone.probe
    base = alone.scores()
    chats = [alone.chat(number) for number in range(len(base))]
    rows = [chat.input_ids for chat in chats]
    masks = [chat.mask(probe.mask) for chat in chats]
    right = score_tokens(model, probe, rows, masks, padding_side="right")
    left = score_tokens(model, probe, rows, masks, padding_side="left")
    return [
        shift_between("in a batch padded on the right", base, right),
        shift_between("in a batch padded on the left", base, left),
    ]


def shift_between(way: str, base: Sequence[Score], other: Sequence[Score]) -> ShiftReading:
    """Changes in standard deviations of the base's token scores.

    :raises ScoringError: other tokens were scored, or all base scores are the same.
    """
    import numpy as np

    if [len(s.tokens) for s in base] != [len(s.tokens) for s in other]:
        raise ScoringError(f"{way}: another number of tokens was scored")
    pooled = np.concatenate([np.array(score.tokens) for score in base])
    spread = float(pooled.std())
    if spread == 0:
        raise ScoringError("all tokens have the same score; the probe reads nothing")
    changes = [np.array(b.tokens) - np.array(a.tokens) for a, b in zip(base, other, strict=True)]
    return ShiftReading(
        way=way,
        tokens=len(pooled),
        mean_shift=max(abs(float(c.mean())) for c in changes) / spread,
        token_shift=max(float(np.abs(c).max()) for c in changes) / spread,
    )


def read_generation(
    model: Any, probe: Probe, cached: Mapping[int, torch.Tensor], text: Sequence[int]
) -> ShiftReading:
    """Scores of activations caught during cached generation beside those of one forward over the
    whole text. The last generated token has none in the first.

    :param cached: layer to ``(1, tokens, hidden)``; see :class:`..witness.Witness`.
    :param text: token ids of prompt and generated tokens.
    """
    import torch

    seen = len(text) - 1
    for layer in probe.layers:
        if tuple(cached[layer].shape[:2]) != (1, seen):
            shape = tuple(cached[layer].shape[:2])
            raise ScoringError(f"generation of {len(text)} tokens was seen as {shape}")
    again = capture(model, torch.tensor([list(text)]), probe.layers)
    both = []
    for streams in (cached, {layer: x[:, :seen] for layer, x in again.items()}):
        sited = {
            layer: at_site(model, x.to(again[layer].device), probe.site)[0]
            for layer, x in streams.items()
        }
        tokens = score_activations(probe, sited)
        both.append(Score(value=0.0, tokens=tokens, positions=tuple(range(seen))))
    return shift_between("re-forwarded after cached generation", both[1:], both[:1])


def read_host_path(alone: Alone) -> ShiftReading:
    """A chat with its activations copied through the host's memory where they go from GPU to GPU;
    where one device holds all, before every block."""
    model, probe, chat = alone.model, alone.probe, alone.chat(0)
    with _through_host(model):
        routed = score_tokens(model, probe, [chat.input_ids], [chat.mask(probe.mask)])
    return shift_between("by way of the host", [alone.score(0)], routed)


@contextmanager
def _through_host(model: Any) -> Iterator[None]:
    import torch

    blocks = list(anatomy(model).blocks)
    devices = [runs_on(block) for block in blocks]
    several = len(set(devices)) > 1
    handles = []

    def route(value: Any, device: torch.device) -> Any:
        if isinstance(value, torch.Tensor):
            copied = value.cpu()
            # On a CPU-only machine .cpu() copies nothing.
            return (copied.clone() if copied is value else copied).to(device)
        if isinstance(value, (tuple, list)):
            return type(value)(route(item, device) for item in value)
        return value

    for number, (block, device) in enumerate(zip(blocks, devices, strict=True)):
        if not several or (number and device != devices[number - 1]):

            def hook(
                _module: Any, args: Any, kwargs: dict[str, Any], device: torch.device = device
            ) -> Any:
                return route(args, device), {k: route(v, device) for k, v in kwargs.items()}

            handles.append(block.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
