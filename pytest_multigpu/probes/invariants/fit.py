"""Does this probe belong to this model: hidden size, layers, and how large activations are.

Imports the other modules of :mod:`pytest_multigpu.probes`, records and errors; numpy inside
functions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...errors import ScoringError
from ...records.probe import ProbeFit, SizeReading
from ..alone import Alone
from ..capture import anatomy, at_site, capture, check_hidden_size
from ..observe import CHATS, Observed, as_row
from ..probe import SITES, Probe
from ..spans import Chat

if TYPE_CHECKING:
    import torch


def fit_of(probe: Probe, model: Any, name: str) -> ProbeFit:
    """:param name: the model as the user named it."""
    parts = anatomy(model)
    return ProbeFit(
        probe_hidden=probe.hidden_size,
        # Not the embedding's width: OPT 350M's is projected to the stream's.
        model_hidden=int(model.config.get_text_config(decoder=True).hidden_size),
        probe_layers=probe.layers,
        model_layers=parts.num_layers,
        probe_model=probe.model,
        model=name,
    )


_AROUND = 4
"""Layers on either side that are read as well."""


def read_sizes(model: Any, probe: Probe, observed: Observed) -> list[SizeReading]:
    """Size of activations at the probe's own layers and site, at the other site, and at some
    layers on either side; empty for a probe without a scaler.

    Over the scored tokens. Each ratio is with the one layer's own ``sum(mean^2 + scale^2)``.

    :raises ScoringError: the probe does not fit.
    """
    for layer in probe.layers:
        observed.stream(layer)
    return _sizes(model, probe, observed.chat, observed.streams, observed.num_layers)


def read_chat_sizes(model: Any, probe: Probe, chat: Chat) -> list[SizeReading]:
    """The same of any chat, with one forward that leaves early.

    :raises ScoringError: the probe does not fit, or the forward failed.
    """
    num_layers = anatomy(model).num_layers
    wanted = sorted({n for layer in probe.layers for n in _around(layer, num_layers)})
    streams = capture(model, as_row(chat), wanted)
    return _sizes(model, probe, chat, streams, num_layers)


def _around(layer: int, num_layers: int) -> range:
    return range(max(0, layer - _AROUND), min(num_layers, layer + _AROUND) + 1)


def _sizes(
    model: Any, probe: Probe, chat: Chat, streams: Mapping[int, torch.Tensor], num_layers: int
) -> list[SizeReading]:
    if probe.mean is None or probe.scale is None:
        return []
    columns = [index for index, on in enumerate(chat.mask(probe.mask)) if on]
    readings = []
    for position, own in enumerate(probe.layers):
        mean, scale = probe.mean[position], probe.scale[position]
        expected = float((mean * mean + scale * scale).sum())
        for layer in _around(own, num_layers):
            check_hidden_size(probe, layer, streams[layer])
            for site in SITES:
                x = at_site(model, streams[layer][:, columns], site).double()
                readings.append(
                    SizeReading(
                        layer=layer,
                        site=site,
                        ratio=float((x * x).sum(-1).mean()) / expected,
                        own_layer=own,
                        is_probe=layer == own and site == probe.site,
                    )
                )
    return readings


def with_scaler(alone: Alone) -> Probe:
    """The probe with mean and scale measured on other texts than the shared forward's, for one
    that has none; they tell the expected size and do not enter its score."""
    import numpy as np

    probe, model = alone.probe, alone.model
    means, scales = [], []
    rows: dict[int, list[Any]] = {layer: [] for layer in probe.layers}
    for number in range(1, len(CHATS)):
        mask = alone.chat(number).mask(probe.mask)
        columns = [index for index, on in enumerate(mask) if on]
        for layer, stream in alone.streams(number).items():
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
