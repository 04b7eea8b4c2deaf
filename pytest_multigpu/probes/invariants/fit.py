"""Does this probe belong to this model: hidden size, layers, and how large activations are.

Imports the other modules of :mod:`pytest_multigpu.probes`, records and errors; numpy inside
functions.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ...errors import ScoringError
from ...records.probe import ProbeFit, SizeReading
from ..alone import Alone
from ..capture import anatomy, at_site, check_hidden_size
from ..observe import CHATS, Observed
from ..probe import SITES, Probe


def fit_of(probe: Probe, model: Any, name: str) -> ProbeFit:
    """:param name: the model as the user named it."""
    parts = anatomy(model)
    return ProbeFit(
        probe_hidden=probe.hidden_size,
        model_hidden=int(parts.embedding.weight.shape[-1]),
        probe_layers=probe.layers,
        model_layers=parts.num_layers,
        probe_model=probe.model,
        model=name,
    )


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
