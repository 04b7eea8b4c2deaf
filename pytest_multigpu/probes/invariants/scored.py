"""One text's scores: read at the right place, of the right tokens, and computed right.

Imports the other modules of :mod:`pytest_multigpu.probes`, records and errors; torch and numpy
inside functions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ...errors import ScoringError
from ...records.probe import ArithmeticReading, HookReading, PlantReading, SpanReading
from ..capture import anatomy, at_site, check_hidden_size, hooked, stream_of
from ..observe import Observed, differing
from ..probe import Probe
from ..reference import affine_scores, aggregate, reference_scores, relative_error
from ..scoring import Score, score_activations, score_tokens

if TYPE_CHECKING:
    import torch


def read_hooks(
    model: Any, probe: Probe, observed: Observed, streams: Mapping[int, torch.Tensor]
) -> list[HookReading]:
    """The scorer's early-exit activations beside the full forward's hidden states.

    :param streams: what the scorer read of the observed chat; see :meth:`..alone.Alone.streams`.
    """
    readings = []
    for layer in probe.layers:
        stream = streams[layer]
        found = at_site(model, stream, probe.site)
        neighbours = [n for n in (layer - 1, layer + 1) if 0 <= n <= observed.num_layers]
        readings.append(
            HookReading(
                layer=layer,
                site=probe.site,
                device=str(stream.device),
                differing=differing(found, _independent(model, observed, layer, probe.site)),
                same_neighbours=tuple(
                    n
                    for n in neighbours
                    if not differing(stream, _independent(model, observed, n, "raw"))
                ),
            )
        )
    return readings


def _independent(model: Any, observed: Observed, layer: int, site: str) -> torch.Tensor:
    """``hidden_states[layer]`` at a site by the model's own modules. The last one is normed by
    the model, so that its raw value is known from the hook alone."""
    import torch

    norm = anatomy(model).norm
    last = layer == observed.num_layers
    if site == "raw":
        return observed.stream(layer) if last else observed.hidden[layer]
    if last:
        return observed.hidden[layer]
    with torch.no_grad():
        normed: torch.Tensor = norm(observed.hidden[layer].to(norm.weight.device))
    return normed


def read_span(tokenizer: Any, probe: Probe, observed: Observed, score: Score) -> SpanReading:
    """Scored tokens beside those found apart from any offset: the fewest tokens that decode to
    each message's text, widened as the probe says."""
    rule, ids = probe.mask, observed.chat.input_ids
    picked: set[int] = set()
    after = 0
    for message in observed.messages:
        start, after = _text_tokens(tokenizer, ids, after, message["content"].strip())
        if message["role"] in rule.roles:
            picked.update(range(max(0, start - rule.left), min(len(ids), after + rule.right)))
    expected = sorted(picked)
    return SpanReading(
        expected=tuple(expected[: len(expected) - rule.exclude_last]), found=score.positions
    )


def _text_tokens(tokenizer: Any, ids: Sequence[int], after: int, wanted: str) -> tuple[int, int]:
    found: list[tuple[int, int]] = []
    for start in range(after, len(ids)):
        for end in range(start + 1, len(ids) + 1):
            text = tokenizer.decode(list(ids[start:end]), skip_special_tokens=False)
            if text.strip() == wanted:
                found.append((start, end))
            # A token adds at most some characters of space around the text.
            if len(text) > len(wanted) + 8:
                break
        if found and start > found[0][1]:
            break
    if not found:
        raise ScoringError(f"the text {wanted!r:.60} is not found among its chat's tokens")
    return min(found, key=lambda place: (place[1] - place[0], place))


def read_arithmetic(model: Any, probe: Probe, observed: Observed) -> list[ArithmeticReading]:
    """float32 on the device beside float64 numpy, on the same activations of every token."""
    import numpy as np

    streams = {
        layer: at_site(model, observed.stream(layer), probe.site)[0] for layer in probe.layers
    }
    device = str(streams[probe.layers[0]].device)
    wide = {
        layer: x.detach().float().cpu().numpy().astype(np.float64) for layer, x in streams.items()
    }
    scores = score_activations(probe, streams)
    flipped = dataclasses.replace(
        probe, directions=tuple(-d for d in probe.directions), bias=-probe.bias
    )
    reference = reference_scores(probe, wide)
    size = float(np.sqrt(np.mean(reference * reference)))
    pairs: dict[str, float] = {
        "standardised": relative_error(scores, reference),
        "affine": relative_error(scores, affine_scores(probe, wide)),
        "sign": relative_error(score_activations(flipped, streams), -reference),
    }
    for how in ("mean", "max", "last"):
        expected = {
            "mean": float(reference.mean()),
            "max": float(reference.max()),
            "last": float(reference[-1]),
        }[how]
        pairs[how] = abs(aggregate(scores, how) - expected) / size if size else float("inf")
    return [
        ArithmeticReading(form=form, device=device, relative_error=error)
        for form, error in pairs.items()
    ]


def read_plant(model: Any, probe: Probe, observed: Observed) -> list[PlantReading]:
    """Adds each layer's own weight to the residual stream at every other scored token, as large
    as the stream itself, and scores through the usual path."""
    import numpy as np
    import torch

    mask = observed.chat.mask(probe.mask)
    scored = [index for index, on in enumerate(mask) if on]
    planted = scored[::2]
    readings = []
    for position, layer in enumerate(probe.layers):
        single = dataclasses.replace(
            probe,
            layers=(layer,),
            directions=(probe.directions[position],),
            mean=probe.mean and (probe.mean[position],),
            scale=probe.scale and (probe.scale[position],),
        )
        stream = observed.stream(layer)
        check_hidden_size(probe, layer, stream)
        weight = single.affine()[0][0]
        unit = torch.from_numpy(weight / np.linalg.norm(weight)).to(stream.device)
        size = float(stream[0].double().norm(dim=-1).median())
        added = torch.zeros(stream.shape, dtype=torch.float64, device=stream.device)
        added[0, planted] = unit * size
        streams: dict[int, torch.Tensor] = {}
        with _planting(model, layer, added):
            rows = [observed.chat.input_ids]
            after = score_tokens(model, single, rows, [mask], see=streams.update)[0].tokens
        seen = streams[layer]
        want = (stream.double() + added).to(stream.dtype)
        before = _reference(model, single, stream)[scored]
        change = np.array(after) - before
        expected = (_reference(model, single, want)[scored] - before)[::2]
        moved = (seen.double() - stream.double())[0, planted].mean(0)
        readings.append(
            PlantReading(
                layer=layer,
                device=str(stream.device),
                expected_shift=float(expected.mean()),
                measured_shift=float(change[::2].mean()),
                elsewhere=float(np.abs(change[1::2]).max(initial=0.0)),
                cosine=float(moved @ unit / moved.norm()),
            )
        )
    return readings


def _reference(model: Any, probe: Probe, stream: torch.Tensor) -> Any:
    activations = at_site(model, stream, probe.site)[0].detach().double().cpu().numpy()
    return reference_scores(probe, {probe.layers[0]: activations})


@contextmanager
def _planting(model: Any, layer: int, added: torch.Tensor) -> Iterator[None]:
    """Adds ``added`` to a layer's output, before any hook that is set later sees it."""

    def plant(output: Any) -> Any:
        stream = stream_of(output, layer)
        changed = (stream.double() + added.to(stream.device)).to(stream.dtype)
        return (changed, *output[1:]) if isinstance(output, (tuple, list)) else changed

    with hooked(model, layer, plant):
        yield
