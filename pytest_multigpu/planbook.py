"""The plans of one run: a model, a machine and a placement, tier by tier.

Glue between the model adapters (bytes of each block, transformers' own device map) and pure
planning. Knows no pytest.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .errors import UsageError
from .options import Settings
from .records.machine import Machine
from .records.plan import TIERS, Architecture, Plan, Tier

if TYPE_CHECKING:
    from .model.config import ResolvedModel

GPU_TIERS: tuple[Tier, ...] = ("16bit", "8bit", "4bit")
"""Best first: what ``auto`` tries."""


class PlanBook:
    """Plans on demand, each made once."""

    def __init__(self, settings: Settings, machine: Machine, environ: Mapping[str, str]) -> None:
        self.settings = settings
        self.machine = machine
        self.environ = environ
        self._plans: dict[Tier, Plan] = {}
        self._architectures: dict[Tier, Architecture] = {}

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
    def chosen(self) -> Plan:
        """The plan of the named tier; under ``auto`` the best that fits, else the smallest."""
        named = self.settings.named_tier
        if named is not None:
            return self.plan(named)
        for tier in GPU_TIERS:
            plan = self.plan(tier)
            if plan.fits:
                return plan
        return plan

    def shortfall(self, tier: Tier) -> str | None:
        """Why no plan of this tier or a better one fits; None if one does."""
        better = [name for name in GPU_TIERS if TIERS.index(name) >= TIERS.index(tier)]
        if any(self.plan(name).fits for name in better):
            return None
        why = "; ".join(self.plan(tier).reasons[:1])
        return f"needs a plan of tier {tier} or better that fits; {why}"

    def why_no_model(self) -> str | None:
        """Why nothing can be loaded; None if the chosen plan fits."""
        plan = self.chosen
        if plan.fits:
            return None
        tier = plan.architecture.tier
        wanted = f"tier {tier}" if self.settings.named_tier else "a tier that fits"
        return f"needs {wanted}; {plan.reasons[0]}"

    def architecture(self, tier: Tier) -> Architecture:
        """Exact bytes of every block in one tier."""
        if tier not in self._architectures:
            from .model.architecture import describe

            self._architectures[tier] = describe(
                self.resolved, tier=tier, dtype=self.settings.dtype
            )
        return self._architectures[tier]

    def plan(self, tier: Tier) -> Plan:
        """The plan of one tier on this machine, made once."""
        if tier not in self._plans:
            self._plans[tier] = self._make(tier)
        return self._plans[tier]
