"""One full forward of one chat with a hook on every layer: what the other readings share.

Imports the other modules of this package, records and errors; torch inside functions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import ScoringError
from ..records.probe import BoundaryReading, LayerReading
from .capture import anatomy, check_ran, forward, out_of_range, watching
from .spans import Chat, Message, tokenize_chat

if TYPE_CHECKING:
    import torch

CHATS: tuple[tuple[Message, ...], ...] = (
    (
        {"role": "system", "content": "You play a trader."},
        {"role": "user", "content": "Did you know of the merger?"},
        {"role": "assistant", "content": "No, I read it in the news."},
    ),
    (
        {"role": "user", "content": "Who took it?"},
        {"role": "assistant", "content": "I did."},
    ),
    (
        {"role": "user", "content": "Where were you at noon?"},
        {"role": "assistant", "content": "At the harbour, counting the boats."},
    ),
)
"""Short texts of different lengths, each with an assistant's answer."""


def chats_for(tokenizer: Any) -> tuple[tuple[Message, ...], ...]:
    """:data:`CHATS` as the chat template takes them: some know no system message."""
    first, *others = CHATS
    try:
        tokenize_chat(tokenizer, first)
    except ScoringError:
        first = first[1:]
    return (first, *others)


@dataclass(frozen=True)
class Observed:
    """One full forward of one chat: ``streams[i]`` is what a hook on layer i saw, ``hidden`` what
    ``output_hidden_states`` returned; all ``(1, tokens, hidden)``, each on its own device."""

    messages: tuple[Message, ...]
    chat: Chat
    input_ids: torch.Tensor
    streams: dict[int, torch.Tensor]
    hidden: tuple[torch.Tensor, ...]
    boundaries: tuple[BoundaryReading, ...]
    num_layers: int

    def stream(self, layer: int) -> torch.Tensor:
        """What the hook on a layer saw.

        :raises ScoringError: no such layer.
        """
        if layer not in self.streams:
            raise ScoringError(out_of_range(layer, self.num_layers))
        return self.streams[layer]


def as_row(chat: Chat) -> torch.Tensor:
    """Token ids ``(1, tokens)`` on the CPU."""
    import torch

    return torch.tensor([chat.input_ids])


def observe(model: Any, tokenizer: Any, messages: Sequence[Message] | None = None) -> Observed:
    """A full forward with ``output_hidden_states`` and a hook on every layer.

    :param messages: by default the first of :func:`chats_for`.
    :raises ScoringError: it failed, or a hook never ran.
    """
    messages = chats_for(tokenizer)[0] if messages is None else messages
    chat = tokenize_chat(tokenizer, messages)
    input_ids = as_row(chat)
    parts = anatomy(model)
    streams: dict[int, torch.Tensor] = {}
    layers = range(parts.num_layers + 1)
    with watching(model, layers, streams.__setitem__), _received(model) as received:
        output = forward(model, input_ids, output_hidden_states=True)
    check_ran(set(layers), streams)
    if output.hidden_states is None or len(output.hidden_states) != len(layers):
        raise ScoringError("the model did not return its hidden states")
    boundaries = []
    for layer in range(parts.num_layers):
        sent = streams[layer]
        got = received.get(layer)
        if got is not None and got.device != sent.device:
            boundaries.append(
                BoundaryReading(
                    layer=layer,
                    source=str(sent.device),
                    target=str(got.device),
                    differing=differing(sent, got),
                )
            )
    return Observed(
        tuple(messages),
        chat,
        input_ids,
        streams,
        tuple(output.hidden_states),
        tuple(boundaries),
        parts.num_layers,
    )


@contextmanager
def _received(model: Any) -> Iterator[dict[int, torch.Tensor]]:
    """What each block works on, seen on its own device: the input of its first norm, after the
    dispatcher has moved it."""
    found: dict[int, torch.Tensor] = {}
    handles = []
    for layer, block in enumerate(anatomy(model).blocks):
        names = ("input_layernorm", "ln_1", "attention_norm")
        norm = next((getattr(block, name) for name in names if hasattr(block, name)), None)
        if norm is not None:

            def see(_module: Any, args: tuple[Any, ...], layer: int = layer) -> None:
                found[layer] = args[0]

            handles.append(norm.register_forward_pre_hook(see))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def differing(a: torch.Tensor, b: torch.Tensor) -> int:
    """Values whose bits differ, compared on the host; all of them if shape or dtype do."""
    import torch

    if a.shape != b.shape or a.dtype != b.dtype:
        return max(a.numel(), b.numel())
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    left, right = a.detach().cpu().contiguous(), b.detach().cpu().contiguous()
    return int((left.view(kind) != right.view(kind)).sum())


def read_layers(observed: Observed) -> list[LayerReading]:
    """Finite and non-zero, token by token, at every layer of the shared forward."""
    readings = []
    for layer, stream in sorted(observed.streams.items()):
        rows = stream[0].float()
        finite = rows.isfinite().all(-1)
        readings.append(
            LayerReading(
                layer=layer,
                device=str(stream.device),
                tokens=len(rows),
                not_finite=int((~finite).sum()),
                zero=int((rows == 0).all(-1).sum()),
            )
        )
    return readings
