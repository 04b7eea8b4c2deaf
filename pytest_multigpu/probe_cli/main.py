"""The command line: options, help texts, and what an error looks like. Imports its siblings, the
probes' names and errors."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ..errors import MultiGpuError
from ..files import why_unread
from ..probes.probe import AGGREGATIONS, SITES
from .convert import convert
from .score import score
from .texts import CONVERTING, SCORING


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 2 with one line on stderr; 130 if interrupted."""
    options = _parser().parse_args(arguments)
    try:
        return convert(options) if options.command == "convert" else score(options)
    except MultiGpuError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a file or folder that nobody foresaw: its name says which
        print(f"error: {error.filename}: {why_unread(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pytest_multigpu.probes")
    commands = parser.add_subparsers(dest="command", required=True)
    shown = argparse.RawDescriptionHelpFormatter
    one = commands.add_parser(
        "convert",
        help="a probe from one format into another, or to another layer or site",
        epilog=CONVERTING,
        formatter_class=shown,
    )
    one.add_argument("source", metavar="IN", help="a probe's file, or a linear head's folder")
    one.add_argument(
        "target", metavar="OUT", help="NAME.safetensors, NAME.pt, NAME.gguf, or a folder"
    )
    one.add_argument(
        "--layer",
        action="append",
        metavar="N|OLD=NEW",
        help="the hidden_states index to read, in place of the file's; again for several",
    )
    one.add_argument(
        "--fold", action="store_true", help="put mean and scale into direction and bias"
    )
    one.add_argument(
        "--lossy",
        action="store_true",
        help="leave out what OUT can't carry, if it changes no score",
    )
    two = commands.add_parser(
        "score",
        help="score transcripts, JSON lines of messages",
        epilog=SCORING,
        formatter_class=shown,
    )
    _add_scoring(two)
    for command in (one, two):
        command.add_argument("--site", choices=SITES, help="in place of the file's")
        command.add_argument("--aggregation", choices=AGGREGATIONS, help="in place of the file's")
    return parser


def _add_scoring(command: argparse.ArgumentParser) -> None:
    """The names of pytest's own options are taken as well: remedies name those."""
    command.add_argument("transcripts", metavar="TRANSCRIPTS")
    command.add_argument("--probe", "--gpu-probe", required=True, metavar="FILE")
    command.add_argument("--model", "--gpu-model", required=True, metavar="NAME|PATH|HUB_ID")
    command.add_argument(
        "--tier", "--gpu-tier", default="16bit", choices=("cpu", "4bit", "8bit", "16bit")
    )
    command.add_argument(
        "--dtype",
        default="bfloat16",
        choices=("bfloat16", "float16", "float32"),
        help="of what is not quantised (default bfloat16)",
    )
    command.add_argument(
        "--weights",
        "--gpu-weights",
        default="checkpoint",
        choices=("checkpoint", "synthetic"),
        help="synthetic: try the machinery without a checkpoint; such scores mean nothing",
    )
    command.add_argument(
        "--placement",
        "--gpu-placement",
        default="balanced",
        metavar="balanced|auto|FILE",
        help="this project's planner (default), transformers' own, or a device map in JSON; "
        "scores do not depend on it",
    )
    command.add_argument(
        "--context",
        "--gpu-context",
        type=_count,
        metavar="N",
        help="tokens of a text to make room for (default: the longest text's)",
    )
    command.add_argument(
        "--batch",
        "--gpu-batch",
        type=_count,
        default=1,
        metavar="N",
        help="texts in one forward (default 1)",
    )
    command.add_argument(
        "--despite-misfit",
        action="store_true",
        help="score although the model's id or the size of activations is not the probe's",
    )
    command.add_argument("--out", metavar="FILE", help="scores as JSON, tokens included")


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text[:12]) <= 10**9):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up")
    return int(text)
