"""Measures, on a loaded model, what must hold of any probe's scores: readings, no verdicts.

One full forward is shared (:func:`observe`); the others leave early or are short.
Imports the other modules of this package, records and errors; torch and numpy inside functions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import ScoringError
from ..records.probe import (
    ArithmeticReading,
    BoundaryReading,
    HookReading,
    LayerReading,
    PlantReading,
    ProbeFit,
    ShiftReading,
    SizeReading,
    SpanReading,
)
from .capture import anatomy, at_site, capture, check_ran, forward, stream_of, watching
from .probe import SITES, Probe
from .reference import affine_scores, aggregate, reference_scores, relative_error
from .scoring import Score, score_activations, score_tokens
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


@dataclass(frozen=True)
class Observed:
    """One full forward of one chat: ``streams[i]`` is what a hook on layer i saw, ``hidden`` what
    ``output_hidden_states`` returned; all ``(1, tokens, hidden)``, each on its own device."""

    chat: Chat
    input_ids: torch.Tensor
    streams: dict[int, torch.Tensor]
    hidden: tuple[torch.Tensor, ...]
    boundaries: tuple[BoundaryReading, ...]
    num_layers: int


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


def observe(model: Any, tokenizer: Any, messages: Sequence[Message] = CHATS[0]) -> Observed:
    """A full forward with ``output_hidden_states`` and a hook on every layer.

    :raises ScoringError: it failed, or a hook never ran.
    """
    import torch

    chat = tokenize_chat(tokenizer, messages)
    input_ids = torch.tensor([chat.input_ids])
    parts = anatomy(model)
    streams: dict[int, torch.Tensor] = {}
    layers = range(parts.num_layers + 1)
    with watching(model, layers, streams.__setitem__), _received(model) as received:
        output = forward(model, input_ids, output_hidden_states=True)
    check_ran(set(layers), streams)
    if output.hidden_states is None or len(output.hidden_states) != len(layers):
        raise ScoringError("the model did not return its hidden states")
    boundaries = []
    for layer in range(1, parts.num_layers):
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
        chat, input_ids, streams, tuple(output.hidden_states), tuple(boundaries), parts.num_layers
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
        return observed.streams[layer] if last else observed.hidden[layer]
    if last:
        return observed.hidden[layer]
    with torch.no_grad():
        normed: torch.Tensor = norm(observed.hidden[layer].to(norm.weight.device))
    return normed


def read_span(tokenizer: Any, probe: Probe, observed: Observed, score: Score) -> SpanReading:
    """Scored tokens beside those that rendering ever more messages gives."""
    rule = probe.mask
    messages = [
        {"role": role, "content": content}
        for role, content in zip(observed.chat.roles, _contents(observed.chat), strict=True)
    ]
    picked: set[int] = set()
    before = 0
    for count, message in enumerate(messages, 1):
        text = tokenizer.apply_chat_template(messages[:count], tokenize=False)
        end = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        if message["role"] in rule.roles:
            inside = range(before, end)
            words = _inner(tokenizer, observed.chat.input_ids, inside, message["content"])
            picked.update(range(words[0] - rule.left, words[1] + rule.right))
        before = end
    inside_text = sorted(i for i in picked if 0 <= i < len(observed.chat.input_ids))
    expected = inside_text[: len(inside_text) - rule.exclude_last]
    return SpanReading(expected=tuple(expected), found=score.positions)


def _contents(chat: Chat) -> list[str]:
    return list(chat.contents)


def _inner(tokenizer: Any, ids: Sequence[int], inside: range, content: str) -> tuple[int, int]:
    """The longest run of a message's tokens that decodes within its text, at the end of it."""
    wanted = content.strip()
    for start in inside:
        for end in range(inside.stop, start, -1):
            if tokenizer.decode(list(ids[start:end]), skip_special_tokens=False).strip() == wanted:
                return start, end
    raise ScoringError("a message's text is not found among its tokens")


def read_arithmetic(model: Any, probe: Probe, observed: Observed) -> list[ArithmeticReading]:
    """float32 on the device beside float64 numpy, on the same activations of every token."""
    import dataclasses

    import numpy as np

    streams = {
        layer: at_site(model, observed.streams[layer], probe.site)[0] for layer in probe.layers
    }
    device = str(streams[probe.layers[0]].device)
    wide = {layer: x.detach().float().cpu().numpy().astype(np.float64) for layer, x in streams.items()}
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
    import dataclasses

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
        stream = observed.streams[layer]
        weight = single.affine()[0][0]
        unit = torch.from_numpy(weight / np.linalg.norm(weight)).to(stream.device)
        size = float(stream[0].double().norm(dim=-1).mean())
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
    device = anatomy(model).embedding.weight.device
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
    devices = [next(block.parameters()).device for block in blocks]
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
            stream = observed.streams[layer][:, columns]
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
