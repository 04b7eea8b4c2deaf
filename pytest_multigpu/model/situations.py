"""One pass of a model on the meta device, recorded: a prompt, a decode step or a probe's.

torch and transformers are imported inside the functions. May import decoders, records and siblings.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..decoders import decoder_of
from ..records.passes import Phase
from .kv import cache_argument
from .meta import decoder_layers

if TYPE_CHECKING:
    from .recording import Event, Recording

STEPS = 2000
"""In a layer, at most: more must be a loop over tokens."""


@dataclass
class Ran:
    """One recording. Layer ``i`` is segment ``2 i + 1``, what follows it ``2 i + 2``; before them
    is 0, after the last comes the norm, then the head."""

    events: list[Event] = field(default_factory=list)
    hidden: list[int] = field(default_factory=list)
    """What each layer gets, and what the last one gives."""
    inputs: list[list[int]] = field(default_factory=list)
    """Bytes of what else each layer gets."""
    logits_bytes: int = 0
    fed: set[tuple[int, int, int]] = field(default_factory=set)
    """As ``Recording.fed``."""


def run_pass(
    model: Any, weights: Collection[int], phase: Phase, *, batch: int, tokens: int, padded: bool
) -> Ran:
    """:param weights: ``id`` of those that the tier quantises.
    :param tokens: of each sequence, in the cache afterwards.
    :param padded: the sequences are of unequal lengths.
    """
    from .recording import Recording

    layers = decoder_layers(model)
    recording = Recording(model, truth=not padded, quantised=weights, most=STEPS * len(layers))
    call = _prepared(model, phase, recording, batch=batch, tokens=tokens, padded=padded)
    ran = Ran()
    hooks = [
        hook
        for index, layer in enumerate(layers)
        for hook in _watch(layer, index, recording, ran, last=index == len(layers) - 1)
    ]
    head = model.get_output_embeddings()
    if head is not None:

        def at_head(*_: Any) -> None:
            recording.segment = 2 * len(layers) + 1

        hooks.append(head.register_forward_pre_hook(at_head))
    try:
        with recording:
            out = call()
            if phase != "probe":
                ran.logits_bytes = int(out.logits.untyped_storage().nbytes())
            ran.events, ran.fed = list(recording.events), recording.fed
    finally:
        for hook in hooks:
            hook.remove()
    return ran


def _watch(layer: Any, index: int, recording: Recording, ran: Ran, *, last: bool) -> list[Any]:
    """Hooks that tell the segments apart and note what goes in and out."""
    from torch import Tensor
    from torch.utils._pytree import tree_leaves

    def enter(_module: Any, args: Any, kwargs: Any) -> None:
        given = {k: v for k, v in kwargs.items() if k not in ("cache", "past_key_values")}
        tensors = [x for x in tree_leaves((args, given)) if isinstance(x, Tensor)]
        hidden = given.get("hidden_states", tensors[0])
        ran.hidden.append(recording.tensor(hidden))
        beside = {x.untyped_storage()._cdata: x for x in tensors if x is not hidden}
        ran.inputs.append([x.numel() * x.element_size() for x in beside.values()])
        recording.segment = 2 * index + 1

    def leave(_module: Any, _args: Any, output: Any) -> None:
        recording.segment = 2 * index + 2
        if last:
            given = output[0] if isinstance(output, (tuple, list)) else output
            ran.hidden.append(recording.tensor(given))

    return [
        layer.register_forward_pre_hook(enter, with_kwargs=True),
        layer.register_forward_hook(leave),
    ]


def _prepared(
    model: Any, phase: Phase, recording: Recording, *, batch: int, tokens: int, padded: bool
) -> Callable[[], Any]:
    """The call to record; a decode step finds a cache of ``tokens - 1``."""
    import torch
    from transformers import DynamicCache

    class Cache(DynamicCache):  # type: ignore[misc]
        """What it keeps is the plan's to count; that it takes something is a step."""

        def update(self, *args: Any, **kwargs: Any) -> Any:
            with recording.paused():
                found = super().update(*args, **kwargs)
            recording.note("cache", 0)
            return found

    runs = decoder_of(model) if phase == "probe" else model
    known = inspect.signature(runs.forward).parameters

    def inputs(new: int, total: int) -> dict[str, Any]:
        """As ``generate`` and a probe give them: each sequence has positions of its own."""
        ids = torch.zeros(batch, new, dtype=torch.long, device="meta")
        given = {"input_ids": ids}
        if "position_ids" in known:
            given["position_ids"] = ids
        if padded:
            given["attention_mask"] = torch.ones(batch, total, dtype=torch.long, device="meta")
        return given

    if phase == "probe":
        return lambda: runs(**inputs(tokens, tokens), use_cache=False)
    cache = Cache(config=model.config)
    more: dict[str, Any] = {cache_argument(model): cache, "use_cache": True}
    if "logits_to_keep" in known:
        more["logits_to_keep"] = 1
    if phase == "prefill":
        return lambda: model(**inputs(tokens, tokens), **more)
    with recording, recording.paused():
        model(**inputs(tokens - 1, tokens - 1), **more)
    recording.events.clear()

    def step() -> Any:
        # generate gathers experts' weights from the second token on.
        with getattr(model, "_optimize_model_for_decode", contextlib.nullcontext)():
            return model(**inputs(1, tokens), **more)

    return step
