"""A seeded probe for a model that has none. Imports records, :mod:`.probe`; numpy in functions."""

from __future__ import annotations

from ..records.probe import default_layer
from .probe import Aggregation, Probe, Site, TokenMask


def synthetic_probe(
    hidden_size: int,
    num_layers: int,
    *,
    layers: tuple[int, ...] | None = None,
    seed: int = 0,
    site: Site = "raw",
    aggregation: Aggregation = "mean",
    model: str | None = None,
    mask: TokenMask | None = None,
) -> Probe:
    """Unit directions drawn from a normal distribution, without scaler or bias.

    :param num_layers: decoder blocks of the model.
    :param layers: ``hidden_states`` indices; by default the one at 22/80 of the depth.
    """
    import numpy as np

    chosen = layers if layers is not None else (default_layer(num_layers),)
    directions = []
    for layer in chosen:
        drawn = np.random.default_rng((seed, layer)).standard_normal(hidden_size)
        directions.append((drawn / np.linalg.norm(drawn)).astype(np.float32))
    return Probe(
        layers=chosen,
        directions=tuple(directions),
        site=site,
        aggregation=aggregation,
        # Llama 3's role header before the text and the end of turn after it, as published.
        mask=mask or TokenMask(left=4, right=1),
        model=model,
        positive_class="synthetic",
        source=f"synthesised with seed {seed}",
        format="synthetic",
    )
