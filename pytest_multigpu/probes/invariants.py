"""Measures, on a loaded model, what must hold of any probe's scores: readings, no verdicts.

One full forward is shared (:mod:`.observe`); the others leave early or are short.
Imports the other modules of this package, records and errors; torch and numpy inside functions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import ScoringError
from ..records.probe import (
    ArithmeticReading,
    HookReading,
    PlantReading,
    ProbeFit,
    ShiftReading,
    SizeReading,
    SpanReading,
)
from .capture import anatomy, at_site, capture, check_hidden_size, runs_on, stream_of, watching
from .observe import CHATS, Observed, as_row, differing
from .probe import SITES, Probe
from .reference import affine_scores, aggregate, reference_scores, relative_error
from .scoring import Score, score_activations, score_tokens
from .spans import tokenize_chat

if TYPE_CHECKING:
    import torch


def fit_of(probe: Probe, model: Any, name: str) -> ProbeFit:
    """:param name: the model as the user named it."""
    parts = anatomy(model)
    return ProbeFit(
        probe_hidden=probe.hidden_size,
        model_hidden=int(parts.embedding.embedding_dim),
        probe_layers=probe.layers,
        model_layers=parts.num_layers,
        probe_model=probe.model,
        model=name,
    )


def read_hooks(model: Any, probe: Probe, observed: Observed) -> list[HookReading]:
    """The scorer's early-exit activations beside the full forward's hidden states."""
    streams = capture(model, observed.input_ids, probe.layers)
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
        with _planting(model, layer, added):
            seen = capture(model, observed.input_ids, (layer,))[layer]
            after = score_tokens(model, single, [observed.chat.input_ids], [mask])[0].tokens
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

    def plant(_module: Any, _args: Any, output: Any) -> Any:
        stream = stream_of(output, layer)
        changed = (stream.double() + added.to(stream.device)).to(stream.dtype)
        return (changed, *output[1:]) if isinstance(output, (tuple, list)) else changed

    handle = anatomy(model).source(layer).register_forward_hook(plant)
    try:
        yield
    finally:
        handle.remove()


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


def read_sizes(model: Any, probe: Probe, observed: Observed, around: int = 4) -> list[SizeReading]:
    """Size of activations at the probe's own layers and site, at the other site, and at up to
    ``around`` layers on either side; empty for a probe without a scaler.

    Over the scored tokens. Each ratio is with the one layer's own ``sum(mean^2 + scale^2)``.
    """
    if probe.mean is None or probe.scale is None:
        return []
    mask = observed.chat.mask(probe.mask)
    columns = [index for index, on in enumerate(mask) if on]
    readings = []
    for position, own in enumerate(probe.layers):
        mean, scale = probe.mean[position], probe.scale[position]
        expected = float((mean * mean + scale * scale).sum())
        low, high = max(0, own - around), min(observed.num_layers, own + around)
        for layer in range(low, high + 1):
            stream = observed.stream(layer)[:, columns]
            for site in SITES:
                x = at_site(model, stream, site).double()
                readings.append(
                    SizeReading(
                        layer=layer,
                        site=site,
                        ratio=float((x * x).sum(-1).mean()) / expected,
                        is_probe=layer == own and site == probe.site,
                    )
                )
    return readings


def with_scaler(model: Any, tokenizer: Any, probe: Probe) -> Probe:
    """``probe`` with mean and scale measured on other texts than the shared forward's, for one
    that has none; they tell the expected size and do not enter its score."""
    import numpy as np

    means, scales = [], []
    rows: dict[int, list[Any]] = {layer: [] for layer in probe.layers}
    for messages in CHATS[1:]:
        chat = tokenize_chat(tokenizer, messages)
        columns = [index for index, on in enumerate(chat.mask(probe.mask)) if on]
        for layer, stream in capture(model, as_row(chat), probe.layers).items():
            check_hidden_size(probe, layer, stream)
            sited = at_site(model, stream[:, columns], probe.site)[0]
            rows[layer].append(sited.double().cpu().numpy())
    for layer in probe.layers:
        x = np.concatenate(rows[layer])
        if not np.isfinite(x).all():
            raise ScoringError(f"hidden_states[{layer}] is not finite on other texts")
        means.append(x.mean(0))
        # A dimension that never varies still needs a scale above zero.
        scales.append(np.maximum(x.std(0), 1e-9))
    return dataclasses.replace(probe, mean=tuple(means), scale=tuple(scales), normalize=False)
