"""The phases whose peaks a plan predicts, run for real. May import records and siblings."""

from __future__ import annotations

from typing import Any

from ..records.model import PhasePeaks
from .generation import chat_tokens
from .kv import cache_name
from .loaded import LoadedModel
from .memory import PeakMeter, give_back

NEW_TOKENS = 16
"""Of the context, how many are generated one by one; the plan reckons with the same."""


def measure_phases(
    loaded: LoadedModel, meter: PeakMeter, *, context_tokens: int, batch: int
) -> tuple[PhasePeaks, ...]:
    """``probe``, ``prefill`` and ``decode``, in the plan's order, after giving cached memory back.

    :param context_tokens: prompt and generated tokens of one sequence.
    """
    import torch

    new = min(NEW_TOKENS, max(1, context_tokens - 1))
    text = chat_tokens(loaded)
    length = max(1, context_tokens - new)
    prompt = (text * (length // len(text) + 1))[:length]
    ids = torch.tensor([list(prompt)] * batch, device=loaded.input_device)
    name = cache_name(loaded.model)
    give_back()
    with torch.no_grad():
        with meter.measure("probe") as probe:
            _probe(loaded, ids)
        with meter.measure("prefill") as prefill:
            out = loaded.model(input_ids=ids, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1:].argmax(dim=-1)
        with meter.measure("decode") as decode:
            for _ in range(new):
                out = loaded.model(
                    input_ids=token.to(loaded.input_device),
                    use_cache=True,
                    logits_to_keep=1,
                    **{name: out[name]},
                )
                token = out.logits[:, -1:].argmax(dim=-1)
            token.tolist()  # waits for the GPUs
    del out, token
    return probe.peaks, prefill.peaks, decode.peaks


def _probe(loaded: LoadedModel, ids: Any) -> None:
    """One forward without head or cache, keeping one layer's output as a probe does, scored in
    fp32 on that layer's GPU."""
    layers = loaded.decoder_layers
    kept: list[Any] = []

    def keep(_module: Any, _args: Any, output: Any) -> None:
        kept.append((output[0] if isinstance(output, tuple) else output).detach())

    handle = layers[len(layers) // 4].register_forward_hook(keep)
    try:
        loaded.model.get_decoder()(input_ids=ids, use_cache=False)
    finally:
        handle.remove()
    stream = kept.pop().float()
    (stream @ stream.new_ones(stream.shape[-1])).tolist()
