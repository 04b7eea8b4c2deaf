"""Scores of chats by a probe on a loaded model, in float32 on each layer's own device.

Imports the other modules of this package and errors; torch and numpy inside functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..errors import ScoringError, first_line
from .capture import anatomy, at_site, capture, check_hidden_size
from .probe import Probe
from .reference import aggregate
from .spans import Message, tokenize_chat

if TYPE_CHECKING:
    import torch

    from .probe import Vector

See = Callable[["dict[int, torch.Tensor]"], None]
"""Is given the activations of each forward: layer to ``(batch, tokens, hidden)``."""

_ROWS = 256
"""Tokens scored at a time: their float32 copies stay within 8 MiB at 8,192 wide."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """One text's score."""

    value: float
    """The tokens' scores aggregated as the probe says."""
    tokens: tuple[float, ...]
    """One for each scored token, in order."""
    positions: tuple[int, ...]
    """Their places in the text's token ids, padding not counted."""


def score_chats(
    model: Any,
    tokenizer: Any,
    probe: Probe,
    chats: Sequence[Sequence[Message]],
    *,
    batch: int = 1,
    padding_side: Literal["left", "right"] = "right",
    see: See | None = None,
) -> tuple[Score, ...]:
    """Scores of chats, each a list of messages with ``role`` and ``content``.

    :param see: looks at the activations that the scores are made of.
    :raises ScoringError: anything that keeps a score from being right; never a default score.
    """
    if batch < 1:
        raise ScoringError(f"batch {batch} is not at least 1")
    prepared = [tokenize_chat(tokenizer, chat) for chat in chats]
    scores: list[Score] = []
    for start in range(0, len(prepared), batch):
        group = prepared[start : start + batch]
        scores += score_tokens(
            model,
            probe,
            [chat.input_ids for chat in group],
            [chat.mask(probe.mask) for chat in group],
            padding_side=padding_side,
            see=see,
        )
    return tuple(scores)


def score_tokens(
    model: Any,
    probe: Probe,
    rows: Sequence[Sequence[int]],
    masks: Sequence[Sequence[bool]],
    *,
    padding_side: Literal["left", "right"] = "right",
    see: See | None = None,
) -> list[Score]:
    """Scores of token ids, all rows in one forward, padded to the longest.

    :param masks: which tokens of each row to score.
    :param see: looks at the activations that the scores are made of.
    :raises ScoringError: a probe that does not fit, a row that the model can't read, a score that
        is not finite.
    """
    if len(masks) != len(rows):
        raise ScoringError(f"{len(masks)} masks for {len(rows)} rows of tokens")
    padded = pad(rows, padding_side)
    check_rows(model, rows)
    streams = capture(model, padded.input_ids, probe.layers, attention_mask=padded.mask)
    if see is not None:
        see(streams)
    scores = []
    for row, mask in enumerate(masks):
        if len(mask) != len(rows[row]):
            raise ScoringError(f"the mask of row {row} is not as long as its tokens")
        positions = [index for index, on in enumerate(mask) if on]
        if not positions:
            raise ScoringError(f"no token to score in row {row}")
        columns = [position + padded.offsets[row] for position in positions]
        picked = {layer: stream[row, columns] for layer, stream in streams.items()}
        tokens = score_activations(
            probe, {k: at_site(model, x, probe.site) for k, x in picked.items()}
        )
        scores.append(
            Score(
                value=aggregate(tokens, probe.aggregation),
                tokens=tokens,
                positions=tuple(positions),
            )
        )
    return scores


def check_rows(model: Any, rows: Sequence[Sequence[int]]) -> None:
    """On a GPU a token that the model lacks ends the process's CUDA; and beyond its context a
    model computes what nobody trained it for.

    :raises ScoringError: a token id or a length that is not the model's.
    """
    known, context = int(anatomy(model).embedding.weight.shape[0]), context_of(model.config)
    for row in rows:
        if not 0 <= min(row) <= max(row) < known:
            worst = max(row) if max(row) >= known else min(row)
            raise ScoringError(
                f"token {worst} is none of the model's {known}; use the model's own tokenizer"
            )
        if context is not None and len(row) > context:
            raise ScoringError(
                f"a text of {len(row)} tokens is longer than the model's context of {context}; "
                "shorten it"
            )


def context_of(config: Any) -> int | None:
    """Tokens that a model was made for; None if its config does not say."""
    text = config.get_text_config(decoder=True)
    context = getattr(text, "max_position_embeddings", None)
    if not isinstance(context, int):
        return None
    rope = getattr(text, "rope_parameters", None) or {}
    # One set of parameters, or one for each kind of layer.
    for found in (rope, *rope.values()):
        if isinstance(found, dict) and isinstance(found.get("factor"), int | float):
            trained = found.get("original_max_position_embeddings") or context
            context = max(context, int(trained * found["factor"]))
    return context


def score_activations(probe: Probe, activations: dict[int, torch.Tensor]) -> tuple[float, ...]:
    """Scores of tokens from their activations at the probe's site.

    :param activations: layer to ``(n_tokens, hidden)``, any float dtype, each on its own device;
        only the scores, one float a token and layer, leave it.
    :raises ScoringError: another hidden size, vectors on another device, or a value not finite.
    """
    import torch

    try:
        parts = [
            _layer_scores(probe, position, activations[layer])
            for position, layer in enumerate(probe.layers)
        ]
    except ScoringError:
        raise
    except Exception as error:
        text = f"scoring failed: {type(error).__name__}: {first_line(error)}"
        raise ScoringError(text) from error
    total = torch.stack(parts).double().mean(0) + probe.bias
    values = tuple(float(value) for value in total)
    aggregate(values, probe.aggregation)
    return values


def _layer_scores(probe: Probe, position: int, x: torch.Tensor) -> torch.Tensor:
    """``(n_tokens,)`` on the CPU. Products are summed without matrix kernels: TF32 settings and
    the number of tokens then change nothing."""
    import torch

    layer = probe.layers[position]
    check_hidden_size(probe, layer, x)
    direction = to_device(probe.directions[position], x.device)
    mean = inverse = None
    if probe.normalize and probe.mean is not None and probe.scale is not None:
        mean = to_device(probe.mean[position], x.device)
        inverse = to_device(1.0 / probe.scale[position], x.device)
    for name, vector in (("direction", direction), ("mean", mean), ("scale", inverse)):
        if vector is not None and vector.device != x.device:
            raise ScoringError(
                f"the probe's {name} for hidden_states[{layer}] is on {vector.device}, "
                f"its activations on {x.device}"
            )
    sums = []
    with torch.no_grad():
        for start in range(0, len(x), _ROWS):
            wide = x[start : start + _ROWS].float()
            if mean is not None and inverse is not None:
                wide = (wide - mean) * inverse
            sums.append((wide * direction).sum(-1))
    return torch.cat(sums).cpu()


def to_device(vector: Vector, device: torch.device) -> torch.Tensor:
    """Float32 copy of a probe's vector on ``device``.

    :raises ScoringError: float32 can't hold it: a value overflows, or all vanish.
    """
    import numpy as np
    import torch

    with np.errstate(over="ignore"):
        single = vector.astype(np.float32)
    if not np.isfinite(single).all() or (vector.any() and not single.any()):
        raise ScoringError("the probe has values that float32 can't hold; scale them")
    return torch.from_numpy(single).to(device)


@dataclass(frozen=True)
class Padded:
    """Rows of token ids padded to one length; both tensors ``(batch, tokens)`` int64 on the CPU."""

    input_ids: torch.Tensor
    mask: torch.Tensor
    offsets: tuple[int, ...]
    """Column of each row's first token."""


def pad(rows: Sequence[Sequence[int]], side: Literal["left", "right"]) -> Padded:
    """Pads with token 0, masked out.

    :raises ScoringError: no row, or an empty one.
    """
    import torch

    if not rows or not all(rows):
        raise ScoringError("a text without tokens can't be scored")
    longest = max(map(len, rows))
    input_ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    offsets = []
    for index, row in enumerate(rows):
        offset = longest - len(row) if side == "left" else 0
        input_ids[index, offset : offset + len(row)] = torch.tensor(list(row))
        mask[index, offset : offset + len(row)] = 1
        offsets.append(offset)
    return Padded(input_ids, mask, tuple(offsets))
