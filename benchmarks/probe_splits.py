"""The text set's probe scores of the same weights over 1, 2 and 4 GPUs, compared to the bit.

``python benchmarks/probe_splits.py --out FILE.json`` loads the synthetic model with its layers
spread evenly over that many GPUs, where they hold it, scores the texts as the shipped check does,
and prints a digest for each: equal digests, equal bits. ``--against OTHER.json``, this script's
result on other GPUs, is compared as well. Exit 1 if one machine's own digests of a tier differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import struct
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import _common

from pytest_multigpu.model.loaded import release
from pytest_multigpu.probes.synthetic import synthetic_probe
from pytest_multigpu.textscores import text_scores

TIERS = ("16bit", "8bit", "4bit")
HELD_BYTES = {"16bit": 145e9, "8bit": 79e9, "4bit": 47e9}
"""What the 70B takes with its transients and a short text, over all GPUs."""
PACKAGES = ("torch", "transformers", "accelerate", "bitsandbytes")
ROOM_TOKENS = 2048
"""No forward is larger, as with the default ``--gpu-context``."""


def main() -> int:
    parser = argparse.ArgumentParser(description="probe scores over 1, 2 and 4 GPUs")
    parser.add_argument("--model", default="llama-3.3-70b")
    parser.add_argument("--tiers", nargs="+", default=list(TIERS), choices=TIERS)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    result: dict[str, Any] = {
        "model": options.model,
        "gpus": names,
        "versions": {name: version(name) for name in PACKAGES},
        "scores": {},
    }
    for tier in options.tiers:
        for gpus in [count for count in (1, 2, 4) if count <= len(names)]:
            free = sum(torch.cuda.mem_get_info(i)[0] for i in range(gpus))
            if options.model == "llama-3.3-70b" and free < HELD_BYTES[tier] + 2e9 * gpus:
                print(f"{tier} on {gpus}: does not fit", flush=True)
                continue
            options.tier = tier
            values = scored(options, gpus, names)
            result["scores"].setdefault(tier, {})[str(gpus)] = values
            options.out.write_text(json.dumps(result) + "\n")
            print(f"{tier} on {gpus}: {digest(values)}", flush=True)
    rows = result["scores"].values()
    same = all(len({digest(values) for values in row.values()}) == 1 for row in rows)
    print(f"equal bits on this machine: {same}")
    if options.against is not None:
        compare(result, json.loads(options.against.read_text()))
    return 0 if same else 1


def scored(options: argparse.Namespace, gpus: int, names: Sequence[str]) -> list[float]:
    """One load, every text scored once."""
    loaded = _common.load(options, gpus)
    try:
        architecture = loaded.architecture
        scores = text_scores(
            loaded,
            synthetic_probe(architecture.hidden_size, architecture.layers),
            room_tokens=ROOM_TOKENS,
            checkpoint=None,
            gpus=names,
            versions={},
        )
    finally:
        release(loaded)
    return list(scores.values)


def compare(here: dict[str, Any], there: dict[str, Any]) -> None:
    """The largest difference of a text's score, in standard deviations of the scores."""
    import numpy as np

    print(f"beside {there['gpus']}, {there['versions']}:")
    for tier, row in here["scores"].items():
        other = next(iter(there["scores"].get(tier, {}).values()), None)
        if other is not None:
            mine = np.array(next(iter(row.values())))
            apart = float(np.abs(mine - np.array(other)).max() / mine.std())
            print(f"  {tier}: {'equal bits' if apart == 0 else f'{apart:.2g} deviations at most'}")


def digest(values: Sequence[float]) -> str:
    return hashlib.sha256(struct.pack(f"<{len(values)}d", *values)).hexdigest()[:16]


if __name__ == "__main__":
    raise SystemExit(main())
