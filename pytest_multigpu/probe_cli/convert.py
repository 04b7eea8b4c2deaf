"""``convert``: a probe from one file format into another, with other layers or another site.

Imports the probes and errors.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path

from ..errors import ProbeFileError, UsageError
from ..probes.formats import load_probe
from ..probes.formats.writing import write_probe
from ..probes.probe import Probe


def convert(options: argparse.Namespace) -> int:
    """:raises UsageError: it can't be read, changed so, or written; one line."""
    probe = changed(load_probe(options.source), options)
    for text in options.layer or ():
        probe = _moved(probe, text)
    if options.fold:
        probe = probe.folded()
    target = Path(options.target)
    _check_target(target)
    written = write_probe(probe, target, lossy=options.lossy)
    layers = ", ".join(map(str, probe.layers))
    print(f"{options.source}: {probe.format}, hidden_states {layers}, site {probe.site}")
    print(f"written: {' and '.join(map(str, written))}")
    return 0


def changed(probe: Probe, options: argparse.Namespace) -> Probe:
    """With ``--site`` and ``--aggregation`` in place of the file's."""
    given = {key: getattr(options, key) for key in ("site", "aggregation")}
    return dataclasses.replace(probe, **{k: v for k, v in given.items() if v is not None})


def _moved(probe: Probe, text: str) -> Probe:
    """``N`` for a probe of one layer, ``OLD=NEW`` for any."""
    old, equals, new = text.rpartition("=")
    numbers = [part for part in (old, new) if part or equals]
    if not all(part.isascii() and part.isdigit() and len(part) < 6 for part in numbers):
        raise UsageError(f"--layer: {text!r} is not a layer; write N, or OLD=NEW")
    if not equals and len(probe.layers) > 1:
        layers = ", ".join(map(str, probe.layers))
        raise UsageError(f"--layer: the probe reads layers {layers}; write OLD={new}")
    moved = int(old) if equals else probe.layers[0]
    if moved not in probe.layers:
        layers = ", ".join(map(str, probe.layers))
        raise UsageError(f"--layer: the probe does not read layer {moved}, but {layers}")
    layers_now = tuple(int(new) if layer == moved else layer for layer in probe.layers)
    return dataclasses.replace(probe, layers=layers_now)


def _check_target(target: Path) -> None:
    """What is there and is no probe stays: a checkpoint, a game's JSON."""
    beside = target.with_suffix(".json") if target.suffix == ".safetensors" else target
    for path in (target, beside):
        # os.path: a name that can't be is for the writer to say.
        if os.path.isfile(path):
            try:
                load_probe(target)
            except ProbeFileError as error:
                text = f"{path}: is there and is no probe's; choose another name"
                raise UsageError(text) from error
