"""The phases whose peaks a plan predicts, run for real. May import decoders, records and siblings.

Several sequences are of unequal lengths, as a game's are: only then transformers makes a padding
mask, and the plan counts it.
"""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

from ..decoders import decoder_of
from ..records.model import PhasePeaks
from ..records.probe import default_layer
from .generation import chat_tokens
from .kv import cache_argument
from .loaded import LoadedModel
from .memory import PeakMeter, give_back

NEW_TOKENS = 2
"""Of the context, how many are generated one by one; the plan reckons with the same."""


def measure_phases(
    loaded: LoadedModel, meter: PeakMeter, *, context_tokens: int, batch: int
) -> tuple[PhasePeaks, ...]:
    """``probe``, ``prefill`` and ``decode``, in the plan's order, after giving cached memory back.

    :param context_tokens: prompt and generated tokens of the longest sequence.
    """
    import torch
    from transformers import DynamicCache

    new = min(NEW_TOKENS, max(1, context_tokens - 1))
    text = chat_tokens(loaded)
    length = max(1, context_tokens - new)
    prompt = (text * (length // len(text) + 1))[:length]
    model, device = loaded.model, loaded.input_device
    ids = torch.tensor([list(prompt)] * batch, device=device)
    mask = padding_mask(batch, length, device)
    cache = DynamicCache(config=model.config)
    fixed = {cache_argument(model): cache, "use_cache": True, "logits_to_keep": 1}
    # What generate does from the second token on: experts' weights are gathered.
    deciding = getattr(model, "_optimize_model_for_decode", contextlib.nullcontext)
    give_back()
    with torch.no_grad():
        with meter.measure("probe") as probe:
            _probe(loaded, ids, mask)
        with meter.measure("prefill") as prefill:
            out = model(input_ids=ids, **padded_inputs(model, mask, length), **fixed)
            token = out.logits[:, -1:].argmax(dim=-1)
        with meter.measure("decode") as decode, deciding():
            for _ in range(new):
                if mask is not None:
                    mask = torch.cat((mask, mask.new_ones(batch, 1)), dim=-1)
                out = model(input_ids=token.to(device), **padded_inputs(model, mask, 1), **fixed)
                token = out.logits[:, -1:].argmax(dim=-1)
            token.tolist()  # waits for the GPUs
    del out, token, cache, fixed
    return probe.peaks, prefill.peaks, decode.peaks


def padding_mask(batch: int, tokens: int, device: Any) -> Any:
    """``(batch, tokens)``, int64: 0 to the left of each sequence but the first, which is whole;
    the last one is a little more than half as long. None for one sequence."""
    import torch

    if batch == 1:
        return None
    missing = torch.arange(batch, device=device) * tokens // (2 * batch)
    # No sequence is empty, and one at least is padded.
    missing[1:].clamp_(min=1).clamp_(max=max(0, tokens - 1))
    return (torch.arange(tokens, device=device) >= missing[:, None]).long()


def padded_inputs(model: Any, mask: Any, new: int) -> dict[str, Any]:
    """The mask, and each sequence's own positions, as ``generate`` and a probe give them."""
    if mask is None:
        return {}
    found = {"attention_mask": mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        found["position_ids"] = (mask.cumsum(dim=-1) - 1).clamp(min=0)[:, -new:]
    return found


def _probe(loaded: LoadedModel, ids: Any, mask: Any) -> None:
    """One forward without head or cache, keeping one layer's output as a probe does, scored in
    fp32 on that layer's GPU."""
    layers = loaded.decoder_layers
    kept: list[Any] = []

    def keep(_module: Any, _args: Any, output: Any) -> None:
        kept.append((output[0] if isinstance(output, tuple) else output).detach())

    handle = layers[default_layer(len(layers)) - 1].register_forward_hook(keep)
    try:
        decoder = decoder_of(loaded.model)
        decoder(input_ids=ids, **padded_inputs(decoder, mask, ids.shape[1]), use_cache=False)
    finally:
        handle.remove()
    stream = kept.pop().float()
    (stream @ stream.new_ones(stream.shape[-1])).tolist()
