"""Options, ini values and the game's own JSON, resolved once into one frozen ``Settings``.

Precedence: command line, then ``--gpu-config``, then ini, then the default. A relative path is
seen from where pytest was started, in an ini file from that file's folder. Knows pytest's parser
and config; reads only the files that the options name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from . import option_values as read
from .errors import UsageError
from .records.tiers import Tier

DEFAULT_MODEL = "llama-3.3-70b"
CPU_MODEL = "tiny-llama"
DEFAULT_CONTEXT = 2048

TIER_ALIASES: Mapping[str, Tier] = read.TIER_ALIASES


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What was asked for. Paths are as given, those of an ini file absolute; times in seconds."""

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

    @property
    def named_tier(self) -> Tier | None:
        """The tier that was demanded; None for ``auto``."""
        return None if self.tier == "auto" else self.tier

    @property
    def demanding(self) -> bool:
        """A missing piece of hardware is a failure, not a skip."""
        return self.strict or self.named_tier in ("4bit", "8bit", "16bit")

    @property
    def takes_gpus(self) -> bool:
        """The cpu tier and a simulated machine leave those of this one alone."""
        return self.tier != "cpu" and self.simulate is None


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

    @property
    def takes_path(self) -> bool:
        return self.metavar in ("DIR", "FILE")


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
        "--gpu-catalogue",
        "GPU types and prices in JSON, changing or adding to the built-in ones",
        "FILE",
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


def asked(config: pytest.Config) -> bool:
    """Is the run about GPUs whatever it collects?

    One of our options was given, or the ini file makes a demand: strict, or a tier of GPUs.

    :raises UsageError: an ini value of those that is no value.
    """
    if any(config.getoption(option.ini) is not None for option in OPTIONS):
        return True
    tier = TIER_ALIASES.get(str(_ini(config, _BY_INI["gpu_tier"]) or "").casefold())
    return bool(_ini(config, _BY_INI["gpu_strict"])) or tier in ("4bit", "8bit", "16bit")


def plan_wanted(config: pytest.Config) -> bool:
    """``--gpu-plan`` was given, or is in the ini file.

    :raises UsageError: the ini value is neither true nor false.
    """
    return bool(config.getoption("gpu_plan") or _ini(config, _BY_INI["gpu_plan"]))


def checks_wanted(config: pytest.Config) -> bool:
    """The shipped checks are to be collected too.

    ``gpu_checks`` of the ini file means whole files and folders: whoever names one test means just
    that one.

    :raises UsageError: the ini value is neither true nor false.
    """
    if config.getoption("gpu_checks"):
        return True
    return bool(_ini(config, _BY_INI["gpu_checks"])) and not any("::" in arg for arg in config.args)


def resolve(config: pytest.Config) -> Settings:
    """The settings of this run.

    :raises UsageError: a value that cannot be; the text names the option and the remedy.
    """
    command = {option.ini: _command(config, option) for option in OPTIONS}
    ini = {option.ini: _ini(config, option) for option in OPTIONS}
    game_tier = game_model = game_probe = None
    config_file = read.path(command["gpu_config"] or ini["gpu_config"], "--gpu-config")
    if config_file is not None:
        from .game_config import read_game_config

        game = read_game_config(config_file)
        game_tier, game_model, game_probe = game.tier, game.model, game.probe

    def value(key: str, from_game: object = None) -> Any:
        if command[key] is not None:
            return command[key]
        return ini[key] if from_game is None else from_game

    tier, dtype = read.tier(value("gpu_tier", game_tier))
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
    strict, plan_only = bool(value("gpu_strict")), bool(value("gpu_plan"))
    if strict and value("gpu_simulate") and not plan_only:
        raise UsageError(
            f"--gpu-strict: nothing can be demanded of a machine that isn't there, "
            f"--gpu-simulate={value('gpu_simulate')}; leave out one of them, also in the ini file"
        )
    return Settings(
        tier=tier,
        dtype=dtype,
        strict=strict,
        model=model or DEFAULT_MODEL,
        weights=weights,
        placement=read.placement(value("gpu_placement") or "auto"),
        probe=read.path(probe, "--gpu-probe"),
        config_file=config_file,
        context=read.whole(value("gpu_context"), "--gpu-context", DEFAULT_CONTEXT),
        batch=read.whole(value("gpu_batch"), "--gpu-batch", 1),
        simulate=value("gpu_simulate"),
        checks=bool(value("gpu_checks")),
        plan_only=plan_only,
        report_dir=read.folder(value("gpu_report"), "--gpu-report"),
        baseline=read.file_or_new(value("gpu_baseline"), "--gpu-baseline"),
        baseline_update=bool(value("gpu_baseline_update")),
        baseline_rule=value("gpu_baseline_rule"),
        catalogue=read.path(value("gpu_catalogue"), "--gpu-catalogue"),
        expected_skips=read.path(value("gpu_expected_skips"), "--gpu-expected-skips"),
        wait_seconds=read.seconds(value("gpu_wait"), "--gpu-wait", 10.0),
    )


_BY_INI = {option.ini: option for option in OPTIONS}


def _command(config: pytest.Config, option: Option) -> Any:
    given = config.getoption(option.ini)
    if isinstance(given, str) and not given.strip():
        # As from an unset variable in a CI file: neither the default nor this folder was meant.
        raise UsageError(f"{option.name}: is empty; give {option.metavar}, or leave it out")
    return given


def _ini(config: pytest.Config, option: Option) -> Any:
    """An ini value; None if it is absent or empty. Paths are made absolute."""
    try:
        found = config.getini(option.ini)
    except (ValueError, TypeError, pytest.UsageError) as error:
        remedy = "true or false" if option.metavar is None else "it in quotes"
        raise UsageError(f"{option.ini}: {error}; write {remedy}") from None
    if option.metavar is None or found is None or not str(found).strip():
        return found or None
    text = str(found)
    home = config.inipath.parent if config.inipath else config.invocation_params.dir
    path = home / read.expanded(text, option.ini)
    if option.ini == "gpu_placement":
        return text if text in ("auto", "balanced") else str(path)
    if option.ini == "gpu_model":
        # A preset or a hub id, unless there is such a folder.
        return str(path) if read.holds(path.is_dir, text, option.ini) else text
    return str(path) if option.takes_path else text
