"""The plans of one run: a model, a machine and a placement, tier by tier.

Glue between the model adapters (bytes of each block, transformers' own device map) and pure
planning. Knows no pytest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UsageError
from .given_files import read_catalogue, read_json
from .options import Settings
from .records.machine import Machine
from .records.plan import (
    TIERS,
    Architecture,
    DeviceMap,
    MaxMemory,
    Plan,
    Tier,
    WeightsSource,
    auto_call,
)
from .records.tiers import GPU_TIERS
from .requirements import GpuRequirement, unmet
from .units import gib

if TYPE_CHECKING:
    from .model.config import ResolvedModel


class PlanBook:
    """Plans on demand, each made once."""

    def __init__(self, settings: Settings, machine: Machine, environ: Mapping[str, str]) -> None:
        self.settings = settings
        self.machine = machine
        self.environ = environ
        self.made: Plan | None = None
        """The chosen plan once it was asked for."""
        self._plans: dict[Tier, Plan] = {}
        self._spreads: dict[tuple[Architecture, Machine, int, int], Plan | None] = {}

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

    def fits_on(self, machine: Machine) -> bool:
        """Would a plan of this model in a tier asked for fit another machine."""
        other = PlanBook(self.settings, machine, self.environ)
        other.resolved = self.resolved
        return any(other.plan(tier).fits for tier in self._tiers)

    @property
    def _tiers(self) -> tuple[Tier, ...]:
        """The named tier, or under ``auto`` all of them, the best first."""
        named = self.settings.named_tier
        return GPU_TIERS if named is None else (named,)

    @property
    def weights(self) -> WeightsSource:
        """Where the weights will come from."""
        if self.settings.weights == "synthetic" or self.resolved.checkpoint is None:
            return "synthetic"
        return "checkpoint"

    @cached_property
    def given_map(self) -> Any:
        """The device map of a ``--gpu-placement`` file as written; None for auto and balanced.

        :raises UsageError: unreadable or malformed.
        """
        if self.settings.placement in ("auto", "balanced"):
            return None
        return read_json(Path(self.settings.placement), "--gpu-placement")

    def check_inputs(self) -> None:
        """Find bad input before anything runs.

        :raises UsageError: the model or the device map cannot be what was meant.
        """
        self.resolved  # noqa: B018
        if self.given_map is not None and self.machine.visible:
            self._parsed_map(self.architecture("16bit"))

    @property
    def chosen(self) -> Plan:
        """The plan of the named tier; under ``auto`` the best that fits, else the smallest."""
        if self.made is None:
            from .planning.fit import choose_tier

            fitting, refused = choose_tier(self.plan, self._tiers)
            self.made = (
                self._with_max_memory(self._with_better_tier(fitting, refused))
                if fitting
                else self._with_remedies(refused[-1])
            )
        return self.made

    def plan(self, tier: Tier) -> Plan:
        """The plan of one tier on this machine, made once."""
        if tier not in self._plans:
            self._plans[tier] = self._make(tier)
        return self._plans[tier]

    def architecture(self, tier: Tier) -> Architecture:
        """Exact bytes of every block in one tier."""
        from .machine.torch_allocator import unlike_planned
        from .model.architecture import describe

        found = describe(self.resolved, tier=tier, dtype=self.settings.dtype)
        unlike = unlike_planned(self.environ)
        if unlike is None or tier == "cpu":
            return found
        return dataclasses.replace(found, unknown=(*found.unknown, unlike))

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
        return (
            f"needs {'a tier that fits' if named is None else f'tier {named}'}; {plan.reasons[0]}"
        )

    def _make(self, tier: Tier) -> Plan:
        from .planning.peaks import predict

        settings = self.settings
        architecture = self.architecture(tier)
        if tier != "cpu" and not self.machine.visible:
            return self._without_gpu(architecture)
        if settings.placement == "balanced" and tier != "cpu":
            spread = self._balanced(architecture)
            if spread is None:
                from .planning.balance import NOWHERE

                raise UsageError(NOWHERE)
            return spread
        device_map, refusal = self._place(architecture)
        plan = predict(
            architecture,
            device_map,
            self.machine,
            context_tokens=settings.context,
            batch=settings.batch,
            weights=self.weights,
            placement=settings.placement,
        )
        if refusal is not None:
            reason = f"device_map='auto' refuses: {refusal}"
            plan = dataclasses.replace(plan, fits=False, reasons=(reason, *plan.reasons))
        return plan

    def _with_remedies(self, plan: Plan) -> Plan:
        """What would make a plan fit; looked for once, since it takes many plans."""
        from .planning.barred import beyond_positions, runs_on
        from .planning.grown import fits_grown
        from .planning.remedies import remedies

        architecture, tier = plan.architecture, plan.architecture.tier
        if tier == "cpu":
            return dataclasses.replace(plan, remedies=remedies(plan, self.machine))
        if not self.machine.visible:
            return plan
        # float16 instead of bfloat16 is 16 bit, whatever was asked for.
        able = all(runs_on(gpu.capability, architecture) for gpu in self.machine.visible_gpus)
        tiers = GPU_TIERS[GPU_TIERS.index(tier) :] if able else GPU_TIERS
        spread = None if plan.placement == "balanced" else self._balanced(architecture)
        mended = spread if spread is not None and spread.fits else None
        grown = None if mended is not None else fits_grown(plan, self.machine, self.spread)
        found = remedies(
            plan,
            self.machine,
            architectures={name: self.architecture(name) for name in tiers},
            catalogue=read_catalogue(self.settings.catalogue),
            spread=self.spread,
            grown=grown,
        )
        if mended is None:
            # No machine to rent has a model with more positions, or runs what none can.
            asked = beyond_positions(architecture, plan.context_tokens)
            mendable = asked or grown is not None or bool(architecture.refused)
            return dataclasses.replace(plan, remedies=found or plan.remedies, mendable=mendable)
        max_memory = self._max_memory(mended)
        if max_memory is not None:
            # Beside --gpu-placement=balanced, which comes first.
            same = f"{auto_call(max_memory)} places it as balanced does"
            found = (*found[:1], same, *found[1:])
        return dataclasses.replace(plan, remedies=found, mendable=True, max_memory=max_memory)

    def _with_better_tier(self, plan: Plan, refused: tuple[Plan, ...]) -> Plan:
        """Says which better tier fits as well, with the balanced placement."""
        from .planning.remedies import fullest

        for better in refused if plan.placement != "balanced" else ():
            spread = self._balanced(better.architecture)
            if spread is not None and spread.fits:
                tier = better.architecture.tier
                what = "auto" if plan.placement == "auto" else "the given"
                text = (
                    f"{tier} does not fit with {what} placement; "
                    f"--gpu-tier={tier} --gpu-placement=balanced fits: {fullest(spread)}"
                )
                return dataclasses.replace(plan, warnings=(*plan.warnings, text))
        return plan

    def _with_max_memory(self, plan: Plan) -> Plan:
        """How plain auto comes out the same, for a plan that the project's planner placed."""
        if plan.placement != "balanced" or plan.architecture.tier == "cpu":
            return plan
        return dataclasses.replace(plan, max_memory=self._max_memory(plan))

    def _max_memory(self, plan: Plan) -> MaxMemory | None:
        from .autoplacement import max_memory

        return max_memory(self.resolved, plan.architecture, plan.device_map)

    def _balanced(self, architecture: Architecture) -> Plan | None:
        return self.spread(architecture, self.machine, self.settings.context, self.settings.batch)

    def spread(
        self, architecture: Architecture, machine: Machine, tokens: int, batch: int
    ) -> Plan | None:
        """The balanced plan, made once: several questions lead to the same one."""
        from .planning.balance import balanced_plan

        key = (architecture, machine, tokens, batch)
        if key not in self._spreads:
            self._spreads[key] = balanced_plan(*key, weights=self.weights)
        return self._spreads[key]

    def _place(self, architecture: Architecture) -> tuple[DeviceMap, str | None]:
        """The device map of this tier, and why auto would refuse it."""
        if architecture.tier == "cpu":
            return {"": "cpu"}, None
        if self.given_map is not None:
            return self._parsed_map(architecture), None
        from .autoplacement import auto_map

        auto = auto_map(self.resolved, architecture, self.machine)
        return auto.device_map, auto.refusal

    def _parsed_map(self, architecture: Architecture) -> dict[str, int | str]:
        from .planning.device_maps import parse_device_map

        return parse_device_map(
            self.given_map,
            source=self.settings.placement,
            architecture=architecture,
            machine=self.machine,
        )

    def _without_gpu(self, architecture: Architecture) -> Plan:
        found = self.machine.problem or unmet(GpuRequirement(), self.machine)
        return Plan(
            architecture=architecture,
            weights=self.weights,
            placement=self.settings.placement,
            context_tokens=self.settings.context,
            batch=self.settings.batch,
            fits=False,
            reasons=(
                f"{gib(architecture.weights_bytes)} of weights have no GPU to go to: {found}",
            ),
            remedies=("run `pytest --gpu-plan --gpu-simulate=4xA6000` to see what would fit",),
        )
