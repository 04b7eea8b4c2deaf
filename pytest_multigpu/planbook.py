"""The plans of one run: a model, a machine and a placement, tier by tier.

Glue between the model adapters (bytes of each block, transformers' own device map) and pure
planning. Knows no pytest.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .errors import UsageError
from .options import Settings
from .records.machine import Machine
from .records.plan import TIERS, Architecture, DeviceMap, Plan, Tier

if TYPE_CHECKING:
    from .model.config import ResolvedModel
    from .planning.catalogue import GpuType

GPU_TIERS: tuple[Tier, ...] = ("16bit", "8bit", "4bit")
"""Best first: what ``auto`` tries."""


class PlanBook:
    """Plans on demand, each made once."""

    def __init__(self, settings: Settings, machine: Machine, environ: Mapping[str, str]) -> None:
        self.settings = settings
        self.machine = machine
        self.environ = environ
        self.made: Plan | None = None
        """The chosen plan once it was asked for."""
        self._plans: dict[Tier, Plan] = {}

    @cached_property
    def resolved(self) -> ResolvedModel:
        """The model's config and, if it is on this machine, its checkpoint.

        :raises UsageError: neither a preset, a folder nor a model that can be found.
        """
        from .model.config import resolve_config

        resolved = resolve_config(self.settings.model, self.environ)
        if self.settings.weights == "checkpoint" and resolved.checkpoint is None:
            raise UsageError(
                f"--gpu-weights: no checkpoint of {self.settings.model!r} on this machine; "
                "download it, give its folder as --gpu-model, or use --gpu-weights=synthetic"
            )
        return resolved

    @property
    def weights(self) -> Literal["synthetic", "checkpoint"]:
        """Where the weights will come from."""
        if self.settings.weights == "synthetic" or self.resolved.checkpoint is None:
            return "synthetic"
        return "checkpoint"

    @cached_property
    def given_map(self) -> Mapping[str, Any] | None:
        """The device map of a ``--gpu-placement`` file as written; None for auto and balanced.

        :raises UsageError: unreadable or malformed.
        """
        if self.settings.placement in ("auto", "balanced"):
            return None
        data = read_json(Path(self.settings.placement), "--gpu-placement")
        if not isinstance(data, dict):
            raise UsageError(
                f"{self.settings.placement}: must hold one JSON object of module path to device, "
                f"not {type(data).__name__}"
            )
        return data

    def check_inputs(self) -> None:
        """Find bad input before anything runs.

        :raises UsageError: the model or the device map cannot be what was meant.
        """
        self.resolved  # noqa: B018
        if self.given_map is not None and self.settings.tier != "cpu":
            from .planning.device_maps import check_devices

            check_devices(self.given_map, self.machine, source=self.settings.placement)

    @property
    def chosen(self) -> Plan:
        """The plan of the named tier; under ``auto`` the best that fits, else the smallest."""
        if self.made is None:
            named = self.settings.named_tier
            tiers = GPU_TIERS if named is None else (named,)
            fitting = (plan for plan in map(self.plan, tiers) if plan.fits)
            self.made = next(fitting, None) or self.plan(tiers[-1])
        return self.made

    def plan(self, tier: Tier) -> Plan:
        """The plan of one tier on this machine, made once."""
        if tier not in self._plans:
            self._plans[tier] = self._make(tier)
        return self._plans[tier]

    def architecture(self, tier: Tier) -> Architecture:
        """Exact bytes of every block in one tier."""
        from .model.architecture import describe

        return describe(self.resolved, tier=tier, dtype=self.settings.dtype)

    def shortfall(self, tier: Tier) -> str | None:
        """Why no plan of this tier or a better one fits; None if one does."""
        better = [name for name in GPU_TIERS if TIERS.index(name) >= TIERS.index(tier)]
        if any(self.plan(name).fits for name in better):
            return None
        return f"needs a plan of tier {tier} or better that fits; {self.plan(tier).reasons[0]}"

    def why_no_model(self) -> str | None:
        """Why nothing can be loaded; None if the chosen plan fits."""
        plan = self.chosen
        if plan.fits:
            return None
        named = self.settings.named_tier
        return f"needs {'a tier that fits' if named is None else f'tier {named}'}; {plan.reasons[0]}"
