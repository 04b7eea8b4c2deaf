"""Options, ini values and the game's own JSON, resolved once into one frozen ``Settings``.

Precedence: command line, then ``--gpu-config``, then ini, then the default. Knows pytest's
parser and config; reads only the files that the options name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from .errors import UsageError
from .files import check_regular, why_unread
from .records.tiers import Tier

DEFAULT_MODEL = "llama-3.3-70b"
CPU_MODEL = "tiny-llama"
DEFAULT_CONTEXT = 2048

TIER_ALIASES: Mapping[str, Tier] = {
    "cpu": "cpu",
    "4bit": "4bit",
    "nf4": "4bit",
    "8bit": "8bit",
    "int8": "8bit",
    "16bit": "16bit",
    "bf16": "16bit",
    "fp16": "16bit",
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What was asked for. Paths are as given; sizes are bytes, times seconds."""

    tier: Literal["auto"] | Tier = "auto"
    dtype: str = "bfloat16"
    strict: bool = False
    model: str = DEFAULT_MODEL
    weights: Literal["auto", "synthetic", "checkpoint"] = "auto"
    placement: str = "auto"
    """``auto``, ``balanced`` or a device-map file."""
    probe: Path | None = None
    config_file: Path | None = None
    context: int = DEFAULT_CONTEXT
    """Tokens in the cache, prompt and generated."""
    batch: int = 1
    simulate: str | None = None
    checks: bool = False
    plan_only: bool = False
    report_dir: Path | None = None
    baseline: Path | None = None
    baseline_update: bool = False
    baseline_rule: str | None = None
    catalogue: Path | None = None
    expected_skips: Path | None = None
    wait_seconds: float = 10.0
    asked: bool = False
    """Any of our options was given on the command line."""

    @property
    def named_tier(self) -> Tier | None:
        """The tier that was demanded; None for ``auto``."""
        return None if self.tier == "auto" else self.tier

    @property
    def demanding(self) -> bool:
        """A missing piece of hardware is a failure, not a skip."""
        return self.strict or self.named_tier in ("4bit", "8bit", "16bit")


@dataclass(frozen=True)
class Option:
    """One row of the table that the parser, the ini file and the README share."""

    name: str
    help: str
    metavar: str | None = None
    """None: a flag."""

    @property
    def ini(self) -> str:
        return self.name.removeprefix("--").replace("-", "_")


OPTIONS: tuple[Option, ...] = (
    Option("--gpu-tier", "auto, cpu, 4bit, 8bit or 16bit (also nf4, int8, bf16, fp16)", "TIER"),
    Option("--gpu-strict", "no hardware skip and no unmeasured check is tolerated"),
    Option("--gpu-model", f"preset, path or hub id (default {DEFAULT_MODEL})", "MODEL"),
    Option("--gpu-weights", "auto, synthetic or checkpoint", "KIND"),
    Option("--gpu-placement", "auto, balanced, or a device_map in JSON", "auto|balanced|FILE"),
    Option("--gpu-probe", "a probe; without it one is synthesised", "FILE"),
    Option("--gpu-config", "the game's own JSON: sets tier, probe and model", "FILE"),
    Option("--gpu-context", f"tokens in the cache (default {DEFAULT_CONTEXT})", "N"),
    Option("--gpu-batch", "sequences (default 1)", "N"),
    Option("--gpu-simulate", "a machine that isn't there: 4xA6000, 2x80GiB", "SPEC"),
    Option("--gpu-checks", "collect the shipped checks beside the project's own tests"),
    Option("--gpu-plan", "print the plan and exit: 0 if it fits, 1 if not"),
    Option("--gpu-report", "write report.json, report.html and device_map.json", "DIR"),
    Option("--gpu-baseline", "compare peaks and speeds with the recorded ones", "FILE"),
    Option("--gpu-baseline-update", "record this run's peaks and speeds"),
    Option("--gpu-baseline-rule", "like peak:2%%+256MiB speed:10%%", "RULE"),
    Option(
        "--gpu-catalogue", "GPU types and prices in JSON, in place of the built-in ones", "FILE"
    ),
    Option("--gpu-expected-skips", "the tests that may skip, and must: lines or JSON", "FILE"),
    Option("--gpu-wait", "seconds to wait for VRAM to clear (default 10)", "SECONDS"),
)


def add_options(parser: pytest.Parser) -> None:
    """Declare every option and its ini value; flags default to None so that ini is reached."""
    group = parser.getgroup("multigpu", "multi-GPU readiness (pytest-multigpu)")
    for option in OPTIONS:
        if option.metavar is None:
            group.addoption(
                option.name, dest=option.ini, action="store_true", default=None, help=option.help
            )
            parser.addini(option.ini, option.help.replace("%%", "%"), type="bool", default=None)
        else:
            group.addoption(
                option.name, dest=option.ini, metavar=option.metavar, default=None, help=option.help
            )
            parser.addini(option.ini, option.help.replace("%%", "%"), default=None)


def plan_wanted(config: pytest.Config) -> bool:
    """``--gpu-plan`` was given, or is in the ini file."""
    return bool(config.getoption("gpu_plan") or config.getini("gpu_plan"))


def resolve(config: pytest.Config) -> Settings:
    """The settings of this run.

    :raises UsageError: a value that cannot be; the text names the option and the remedy.
    """
    command = {option.ini: config.getoption(option.ini) for option in OPTIONS}
    ini = {option.ini: config.getini(option.ini) for option in OPTIONS}
    game_tier = game_model = game_probe = None
    config_file = _path(command["gpu_config"] or ini["gpu_config"], "--gpu-config")
    if config_file is not None:
        from .game_config import read_game_config

        game = read_game_config(config_file)
        game_tier, game_model, game_probe = game.tier, game.model, game.probe

    def value(key: str, from_game: object = None) -> Any:
        if command[key] is not None:
            return command[key]
        if from_game is not None:
            return from_game
        return ini[key] if ini[key] not in ("", None) else None

    tier, dtype = _tier(value("gpu_tier", game_tier))
    model = value("gpu_model", game_model)
    if tier == "cpu":
        # The built-in model, unless one was named on this very command line.
        model = command["gpu_model"] or CPU_MODEL
    probe = value("gpu_probe", game_probe)
    if tier == "cpu" and command["gpu_probe"] is None:
        probe = None  # made for the game's model, not for the built-in one
    weights: Any = value("gpu_weights") or "auto"
    if weights not in ("auto", "synthetic", "checkpoint"):
        raise UsageError(
            f"--gpu-weights: unknown kind {weights!r}; known: auto, synthetic, checkpoint"
        )
    if value("gpu_baseline_update") and not value("gpu_baseline"):
        raise UsageError("--gpu-baseline-update: needs --gpu-baseline=FILE to write to")
    return Settings(
        tier=tier,
        dtype=dtype,
        strict=bool(value("gpu_strict")),
        model=model or DEFAULT_MODEL,
        weights=weights,
        placement=_placement(value("gpu_placement") or "auto"),
        probe=_path(probe, "--gpu-probe"),
        config_file=config_file,
        context=_whole(value("gpu_context"), "--gpu-context", DEFAULT_CONTEXT),
        batch=_whole(value("gpu_batch"), "--gpu-batch", 1),
        simulate=value("gpu_simulate"),
        checks=bool(value("gpu_checks")),
        plan_only=bool(value("gpu_plan")),
        report_dir=_folder(value("gpu_report"), "--gpu-report"),
        baseline=_file_or_new(value("gpu_baseline")),
        baseline_update=bool(value("gpu_baseline_update")),
        baseline_rule=value("gpu_baseline_rule"),
        catalogue=_path(value("gpu_catalogue"), "--gpu-catalogue"),
        expected_skips=_path(value("gpu_expected_skips"), "--gpu-expected-skips"),
        wait_seconds=_seconds(value("gpu_wait"), "--gpu-wait", 10.0),
        asked=any(setting is not None for setting in command.values()),
    )


def _tier(text: str | None) -> tuple[Any, str]:
    folded = (text or "auto").casefold()
    if folded == "auto":
        return "auto", "bfloat16"
    tier = TIER_ALIASES.get(folded)
    if tier is None:
        raise UsageError(
            f"--gpu-tier: unknown tier {text!r}; known: auto, cpu, 4bit, 8bit, 16bit "
            "(also nf4, int8, bf16, fp16)"
        )
    return tier, "float16" if folded == "fp16" else "bfloat16"


def _placement(text: str) -> str:
    if text in ("auto", "balanced"):
        return text
    if not Path(text).is_file():
        raise UsageError(
            f"--gpu-placement: {text!r} is neither auto, balanced nor a file; "
            "give a device_map in JSON"
        )
    return text


def _path(text: object, option: str) -> Path | None:
    if text is None or text == "":
        return None
    path = Path(str(text)).expanduser()
    try:
        check_regular(path)
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{option}: no file {str(path)!r}; check the path") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{option}: {str(path)!r}: {why_unread(error)}; check the path") from None
    return path


def _folder(text: str | None, option: str) -> Path | None:
    if text is None:
        return None
    path = Path(text).expanduser()
    if path.exists() and not path.is_dir():
        raise UsageError(f"{option}: {str(path)!r} is a file; give a folder")
    return path


def _file_or_new(text: str | None) -> Path | None:
    if text is None:
        return None
    path = Path(text).expanduser()
    if path.is_dir():
        raise UsageError(f"--gpu-baseline: {str(path)!r} is a folder; give a file")
    return _path(text, "--gpu-baseline") if os.path.exists(path) else path


def _number(text: object, option: str, convert: Callable[[str], float], like: str) -> float:
    try:
        return convert(str(text))
    except ValueError:
        raise UsageError(f"{option}: {text!r} is not a number; write it like {like}") from None


def _whole(text: object, option: str, default: int) -> int:
    if text is None:
        return default
    number = int(_number(text, option, int, str(default)))
    if not 1 <= number <= 10**9:
        raise UsageError(f"{option}: {number} is out of range; write 1 or more")
    return number


def _seconds(text: object, option: str, default: float) -> float:
    if text is None:
        return default
    number = _number(text, option, float, "10")
    if not 0 <= number <= 3600:
        raise UsageError(f"{option}: {text} is out of range; write 0 to 3600 seconds")
    return number
