"""The text set's probe scores in 16, 8 and 4 bit on the same weights, one load after another.

``python benchmarks/probe_drift.py OUT.json [--model NAME] [--probe FILE] [--tiers cpu]``. Scores as
the shipped check does; OUT.json is what it keeps as ``drift.json``: what is there is compared with
and added to. Without a checkpoint the weights are synthesised from the same seed in every tier.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import struct
import time
from pathlib import Path
from typing import Any

from pytest_multigpu.judging.drift import judge_drift
from pytest_multigpu.judging.probe import shift_limits
from pytest_multigpu.options import CPU_MODEL, DEFAULT_MODEL, Settings
from pytest_multigpu.probes.drift import drift_between
from pytest_multigpu.report.drift import drift_rows, keep_scores, read_drift
from pytest_multigpu.session import GpuSession


def run(out: Path, tier: Any, options: argparse.Namespace) -> None:
    """Score in one tier, compare with what OUT.json holds, and add to it."""
    model = options.model or (CPU_MODEL if tier == "cpu" else DEFAULT_MODEL)
    settings = Settings(
        tier=tier, model=model, placement=options.placement, probe=options.probe, report_dir=None
    )
    session = GpuSession(settings, os.environ)
    began = time.perf_counter()
    try:
        session.load()
        loaded = time.perf_counter()
        scores = session.score_texts()
    finally:
        session.close()
    seconds = time.perf_counter() - loaded
    # Equal digests: equal to the bit, on other GPUs or over another number of them.
    packed = struct.pack(f"<{len(scores.values)}d", *scores.values)
    digest = hashlib.sha256(packed).hexdigest()[:16]
    print(f"{tier}: digest {digest}, scored in {seconds:.2f} s, loaded in {loaded - began:.1f} s")
    limits = shift_limits(scores.dtype, scores.tier)
    for record in judge_drift(scores, read_drift(out), drift_between, limits, file=str(out)):
        print(f"  {record.outcome}  {record.name}: {record.measured}; {record.reason}")
    keep_scores(out, scores)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--tiers", nargs="+", default=["16bit", "8bit", "4bit"])
    parser.add_argument("--placement", default="auto")
    parser.add_argument("--probe", type=Path)
    options = parser.parse_args()
    for tier in options.tiers:
        run(options.out, tier, options)
    print(f"{'tier':<8} {'base':<8} {'rank corr':>9} {'shift':>7} {'spread':>7} {'scale':>6}")
    for row in drift_rows(read_drift(options.out)):
        print(
            f"{row['tier']:<8} {row['base']:<8} {row['rank_correlation']:>9.4f} "
            f"{row['shift']:>+7.3f} {row['spread']:>7.3f} {row['scale']:>6.3f}  {row['advice']}"
        )


if __name__ == "__main__":
    main()
