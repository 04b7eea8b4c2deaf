"""The same text scored in other ways: in batches, after generation, by way of the host.

Imports the other modules of :mod:`pytest_multigpu.probes`, records and errors; torch and numpy
inside functions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ...errors import ScoringError
from ...records.probe import ShiftReading
from ..capture import anatomy, at_site, capture, runs_on, watching
from ..observe import CHATS, Observed
from ..probe import Probe
from ..scoring import Score, score_activations, score_tokens
from ..spans import tokenize_chat

if TYPE_CHECKING:
    import torch


def read_batches(model: Any, tokenizer: Any, probe: Probe) -> list[ShiftReading]:
    """Three chats of different lengths, one at a time and as one batch padded on either side."""
    chats = [tokenize_chat(tokenizer, chat) for chat in CHATS]
    rows = [chat.input_ids for chat in chats]
    masks = [chat.mask(probe.mask) for chat in chats]
    alone = [score_tokens(model, probe, [r], [m])[0] for r, m in zip(rows, masks, strict=True)]
    right = score_tokens(model, probe, rows, masks, padding_side="right")
    left = score_tokens(model, probe, rows, masks, padding_side="left")
    return [
        shift_between("in a batch padded on the right", alone, right),
        shift_between("in a batch padded on the left", alone, left),
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
    model: Any, probe: Probe, observed: Observed, new_tokens: int = 8
) -> ShiftReading:
    """Scores of activations caught during cached generation beside those of one forward over the
    whole text. The last generated token has none in the first."""
    import torch

    steps: dict[int, list[torch.Tensor]] = {layer: [] for layer in probe.layers}
    device = runs_on(anatomy(model).embedding)
    prompt = observed.input_ids.to(device)
    with watching(model, probe.layers, lambda layer, x: steps[layer].append(x)), torch.no_grad():
        text = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
    cached = {layer: torch.cat(parts, dim=1) for layer, parts in steps.items()}
    seen = cached[probe.layers[0]].shape[1]
    if seen != text.shape[1] - 1 or text.shape[1] != prompt.shape[1] + new_tokens:
        raise ScoringError(f"generation gave {text.shape[1]} tokens, of which {seen} were seen")
    again = capture(model, text.cpu(), probe.layers)
    both = []
    for streams in (cached, {layer: x[:, :seen] for layer, x in again.items()}):
        sited = {layer: at_site(model, x, probe.site)[0] for layer, x in streams.items()}
        tokens = score_activations(probe, sited)
        both.append(Score(value=0.0, tokens=tokens, positions=tuple(range(seen))))
    return shift_between("re-forwarded after cached generation", both[1:], both[:1])


def read_host_path(model: Any, probe: Probe, observed: Observed) -> ShiftReading:
    """The same chat with its activations copied through the host's memory where they go from
    GPU to GPU; where one device holds all, before every block."""
    mask = observed.chat.mask(probe.mask)
    direct = score_tokens(model, probe, [observed.chat.input_ids], [mask])
    with _through_host(model):
        routed = score_tokens(model, probe, [observed.chat.input_ids], [mask])
    return shift_between("by way of the host", direct, routed)


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
