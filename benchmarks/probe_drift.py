"""Probe scores of one text set in 16, 8 and 4 bit on the same weights, one load after another.

``python benchmarks/probe_drift.py OUT.json [--model NAME] [--probe FILE] [--earlier FILE]``.
Without a checkpoint the weights are synthesised from the same seed in every tier.
"""

from __future__ import annotations

import argparse
import hashlib
import struct
import time
from dataclasses import asdict
from pathlib import Path

from pytest_multigpu.model.loaded import release
from pytest_multigpu.model.loading import load_model
from pytest_multigpu.probes.drift import compare_with_earlier, drift_table, write_drift
from pytest_multigpu.probes.formats import load_probe
from pytest_multigpu.probes.scoring import score_chats
from pytest_multigpu.probes.spans import Message
from pytest_multigpu.probes.synthetic import synthetic_probe

_OPENINGS = ("I was at home", "I know nothing of it", "She gave it to me", "We met by chance")
_MIDDLES = ("all evening", "as I said", "and left soon", "in the harbour", "before the storm")
_ENDS = ("with my brother.", "alone.", "for an hour.")


def texts() -> list[list[Message]]:
    """60 short dialogues that differ in the assistant's answer."""
    answers = [f"{a} {b} {c}" for a in _OPENINGS for b in _MIDDLES for c in _ENDS]
    question = "Where were you when it happened?"
    return [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for answer in answers
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="llama-3.3-70b")
    parser.add_argument("--tiers", nargs="+", default=["16bit", "8bit", "4bit"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device-map", default="auto", choices=["auto", "one", "cpu"])
    parser.add_argument("--probe")
    parser.add_argument("--earlier", type=Path)
    options = parser.parse_args()
    placed = {"one": {"": 0}, "cpu": {"": "cpu"}}.get(options.device_map, "auto")
    scores: dict[str, list[float]] = {}
    about: dict[str, object] = {"model": options.model, "dtype": options.dtype, "texts": 60}
    for tier in options.tiers:
        start = time.perf_counter()
        loaded = load_model(options.model, tier=tier, dtype=options.dtype, device_map=placed)
        try:
            shape = loaded.architecture
            probe = (
                load_probe(options.probe)
                if options.probe
                else synthetic_probe(shape.hidden_size, shape.layers)
            )
            about.update(weights=loaded.load.weights, probe=probe.source, layers=probe.layers)
            found = score_chats(loaded.model, loaded.tokenizer, probe, texts())
            scores[tier] = [score.value for score in found]
        finally:
            release(loaded)
        # Equal digests: equal to the bit, on other GPUs or over another number of them.
        digest = hashlib.sha256(struct.pack(f"<{len(found)}d", *scores[tier])).hexdigest()[:16]
        about[f"{tier} digest"] = digest
        seconds = time.perf_counter() - start
        print(f"{tier}: digest {digest}, {len(found)} texts, {seconds:.1f} s with load")
    base = options.tiers[0]
    rows = drift_table(scores, base)
    if options.earlier is not None:
        rows += compare_with_earlier(options.earlier, scores)
        about["earlier"] = [asdict(row) for row in rows[len(scores) - 1 :]]
    write_drift(options.out, scores, base, about=about)
    print(f"{'tier':<8} {'base':<16} {'rank corr':>9} {'shift':>7} {'spread':>7} {'scale':>6}")
    for row in rows:
        print(
            f"{row.tier:<8} {row.base:<16} {row.rank_correlation:>9.4f} {row.shift:>+7.3f} "
            f"{row.spread:>7.3f} {row.scale:>6.3f}  {row.advice}"
        )


if __name__ == "__main__":
    main()
