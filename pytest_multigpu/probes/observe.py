"""One full forward of one chat with a hook on every layer: what the other readings share.

Imports the other modules of this package, records and errors; torch inside functions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import ScoringError
from ..records.probe import BoundaryReading, LayerReading
from .capture import anatomy, check_ran, forward, out_of_range, runs_on, watching
from .probe import TokenMask
from .spans import Chat, Message, long_enough, tokenize_chat

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


def chats_for(tokenizer: Any, rule: TokenMask | None = None) -> tuple[tuple[Message, ...], ...]:
    """:data:`CHATS` as the chat template takes them, some knowing no system message; and long
    enough for a probe that leaves out the last tokens."""
    first, *others = CHATS
    try:
        tokenize_chat(tokenizer, first)
    except ScoringError:
        first = first[1:]
    return tuple(long_enough(tokenizer, c, rule or TokenMask()) for c in (first, *others))


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


def observe(model: Any, tokenizer: Any, rule: TokenMask | None = None) -> Observed:
    """A full forward of the first of :func:`chats_for` with ``output_hidden_states`` and a hook on
    every layer.

    :raises ScoringError: it failed, or a hook never ran.
    """
    messages = chats_for(tokenizer, rule)[0]
    chat = tokenize_chat(tokenizer, messages)
    input_ids = as_row(chat)
    parts = anatomy(model)
    streams: dict[int, torch.Tensor] = {}
    layers = range(parts.num_layers + 1)
    with watching(model, layers, streams.__setitem__), _received(model, streams) as received:
        output = forward(model, input_ids, output_hidden_states=True)
    check_ran(set(layers), streams)
    if output.hidden_states is None or len(output.hidden_states) != len(layers):
        raise ScoringError("the model did not return its hidden states")
    return Observed(
        messages,
        chat,
        input_ids,
        streams,
        tuple(output.hidden_states),
        tuple(read_boundaries(streams, received, [runs_on(block) for block in parts.blocks])),
        parts.num_layers,
    )


@contextmanager
def _received(
    model: Any, sent: Mapping[int, torch.Tensor]
) -> Iterator[dict[int, tuple[str, torch.Tensor]]]:
    """Layer to what the block that works on it was given, and that block's class; seen on its own
    device, as the input of the first module inside it: its dispatcher has moved it by then."""
    import torch

    found: dict[int, tuple[str, torch.Tensor]] = {}
    with ExitStack() as stack:
        for layer, block in enumerate(anatomy(model).blocks):
            kind = type(block).__name__

            def see(
                _module: Any,
                args: tuple[Any, ...],
                kwargs: dict[str, Any],
                layer: int = layer,
                kind: str = kind,
            ) -> None:
                if layer in found or layer not in sent:
                    return
                given = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)]
                shape = sent[layer].shape
                value = next((v for v in given if v.shape == shape), None)
                if value is not None:
                    found[layer] = kind, value

            for module in block.modules():
                if module is not block:
                    handle = module.register_forward_pre_hook(see, with_kwargs=True)
                    stack.callback(handle.remove)
        yield found


def read_boundaries(
    sent: Mapping[int, torch.Tensor],
    received: Mapping[int, tuple[str, torch.Tensor]],
    devices: Sequence[torch.device],
) -> list[BoundaryReading]:
    """Each place where a block runs on another device than the one whose output it works on.

    :param sent: layer to its stream, where it was made.
    :param received: layer to the class of the block that works on it and to what was seen inside
        that block. A class whose modules are given something else than the block is can't tell: it
        shows where nothing moves.
    :param devices: where each block runs.
    """
    elsewhere = {
        kind
        for layer, (kind, got) in received.items()
        if got.device == sent[layer].device == devices[layer] and differing(sent[layer], got)
    }
    readings = []
    for layer, target in enumerate(devices):
        if target == sent[layer].device:
            continue
        kind, got = received.get(layer, ("", None))
        readable = got is not None and got.device == target and kind not in elsewhere
        readings.append(
            BoundaryReading(
                layer=layer,
                source=str(sent[layer].device),
                target=str(target),
                differing=differing(sent[layer], got) if got is not None and readable else None,
            )
        )
    return readings


def differing(a: torch.Tensor, b: torch.Tensor) -> int:
    """Values whose bits differ; all of them if shape or dtype do. Compared where both are, or else
    on the host: a copy from one GPU to the other may be what is wrong."""
    import torch

    if a.shape != b.shape or a.dtype != b.dtype:
        return max(a.numel(), b.numel())
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    left, right = a.detach(), b.detach()
    if left.device != right.device:
        left, right = left.cpu(), right.cpu()
    return int((left.contiguous().view(kind) != right.contiguous().view(kind)).sum())


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
