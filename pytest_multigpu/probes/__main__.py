"""``python -m pytest_multigpu.probes convert IN OUT`` and ``... score``. Imports this package;
the model's loader only to score."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import MultiGpuError
from .formats import load_probe, save_probe
from .probe import AGGREGATIONS, SITES, Probe


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 2 with one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m pytest_multigpu.probes")
    commands = parser.add_subparsers(dest="command", required=True)
    convert = commands.add_parser("convert", help="any known format to safetensors with JSON")
    convert.add_argument("source", metavar="IN")
    convert.add_argument("target", metavar="OUT.safetensors")
    score = commands.add_parser("score", help="score transcripts, JSON lines of messages")
    score.add_argument("transcripts", metavar="TRANSCRIPTS")
    score.add_argument("--probe", required=True, metavar="FILE")
    score.add_argument("--model", required=True, metavar="NAME|PATH|HUB_ID")
    score.add_argument("--tier", default="16bit", choices=("cpu", "4bit", "8bit", "16bit"))
    score.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    score.add_argument("--batch", type=int, default=1, help="texts in one forward (default 1)")
    score.add_argument("--out", metavar="FILE", help="scores as JSON, tokens included")
    for command in (convert, score):
        command.add_argument("--site", choices=SITES, help="in place of the file's")
        command.add_argument("--aggregation", choices=AGGREGATIONS, help="in place of the file's")
    options = parser.parse_args(arguments)
    try:
        return _convert(options) if options.command == "convert" else _score(options)
    except MultiGpuError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _probe(path: str, options: argparse.Namespace) -> Probe:
    probe = load_probe(path)
    changed = {key: getattr(options, key) for key in ("site", "aggregation")}
    return dataclasses.replace(probe, **{k: v for k, v in changed.items() if v is not None})


def _convert(options: argparse.Namespace) -> int:
    probe = _probe(options.source, options)
    tensors, sidecar = save_probe(probe, options.target)
    layers = ", ".join(map(str, probe.layers))
    print(f"{options.source}: {probe.format}, hidden_states {layers}, site {probe.site}")
    print(f"written: {tensors} and {sidecar}")
    return 0


def _score(options: argparse.Namespace) -> int:
    from .scoring import score_chats
    from .transcripts import area_of, read_transcripts, table

    probe = _probe(options.probe, options)
    transcripts = read_transcripts(Path(options.transcripts))

    from ..model.loaded import release
    from ..model.loading import load_model

    placed: str | dict[str, int | str] = {"": "cpu"} if options.tier == "cpu" else "auto"
    loaded = load_model(options.model, tier=options.tier, dtype=options.dtype, device_map=placed)
    try:
        scores = score_chats(
            loaded.model,
            loaded.tokenizer,
            probe,
            [transcript.messages for transcript in transcripts],
            batch=options.batch,
        )
    finally:
        release(loaded)
    print("\n".join(table(probe, transcripts, scores)))
    print(f"weights: {loaded.load.weights}; probe: {probe.source}")
    if options.out:
        area = area_of(transcripts, scores)
        content = {
            "probe": probe.source,
            "model": options.model,
            "weights": loaded.load.weights,
            "auroc": None if area is None else dataclasses.asdict(area),
            "scores": [
                {"id": t.name, "label": t.label, **dataclasses.asdict(s)}
                for t, s in zip(transcripts, scores, strict=True)
            ],
        }
        Path(options.out).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
