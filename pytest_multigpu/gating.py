"""May this test run here? Skips that say what was needed and found; failures where it was demanded.

Reads marks through :mod:`markers` and facts through the session; raises only usage errors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest

from .markers import check_needs, gpu_requirement, size_limit, tier_requirement, uses_model
from .requirements import GpuRequirement, unmet
from .session import GpuSession


@dataclass(frozen=True, kw_only=True)
class Gate:
    """``skip`` and ``fail`` carry the text that people read."""

    action: Literal["run", "skip", "fail"] = "run"
    text: str = ""
    shortfall: bool = False
    """The machine lacks what was needed: a failure of this kind ends in exit 10."""


RUN = Gate()


def gate(item: pytest.Item, session: GpuSession) -> Gate:
    """Decide for one test, just before its setup."""
    needs = check_needs(item)
    if needs is not None:
        return _check_gate(needs, session)
    requirement = gpu_requirement(item)
    tier = tier_requirement(item)
    measured = [n for n in ("gpu_peak_limit", "gpu_leak_limit") if size_limit(item, n) is not None]
    model = uses_model(item)
    if requirement is None and tier is None and not measured:
        return model_gate(session) if model else RUN
    if session.settings.simulate is not None:
        return Gate(action="skip", text=_simulated(session))
    if session.machine.problem is not None:
        # Only "no GPU" may skip; a detection that broke is a failure.
        return _not_asked(session)
    lacking = None
    if requirement is not None or measured:
        # A limit needs a GPU to be measured on.
        lacking = unmet(requirement or GpuRequirement(), session.machine)
    if lacking is None and tier is not None:
        lacking = session.plans.shortfall(tier)
    if lacking is not None:
        return _lacking(lacking, session)
    return model_gate(session) if model else RUN


def obey(decision: Gate) -> None:
    """Skip or fail as decided, from within a test or a fixture; nothing if it may run."""
    if decision.action == "skip":
        pytest.skip(decision.text)
    if decision.action == "fail":
        failure: Any = pytest.fail.Exception(decision.text, pytrace=False)
        setattr(failure, _SHORTFALL, decision.shortfall)
        raise failure


_SHORTFALL = "multigpu_shortfall"


def fell_short(raised: BaseException | None) -> bool:
    """It was raised by :func:`obey`, and means only that the machine falls short."""
    return bool(getattr(raised, _SHORTFALL, False))


def model_gate(session: GpuSession) -> Gate:
    """May a model be loaded here? Also asked by the fixtures that need one."""
    settings = session.settings
    if settings.simulate is not None:
        return Gate(action="skip", text=_simulated(session))
    if settings.tier == "cpu":
        return RUN
    if session.machine.problem is not None:
        return _not_asked(session)
    lacking = session.plans.why_no_model()
    if lacking is None:
        return RUN
    return replace(_lacking(lacking, session), shortfall=not session.plan.mendable)


def allowed(decision: Gate) -> Gate:
    """The gate of a test that ``--gpu-expected-skips`` lists: a demand may skip it after all."""
    if decision.action == "fail" and decision.shortfall:
        return replace(decision, action="skip")
    return decision


def _check_gate(needs: str, session: GpuSession) -> Gate:
    simulated = session.settings.simulate is not None
    if needs == "plan":
        return RUN
    if simulated:
        return Gate(action="skip", text=_simulated(session))
    if needs == "host":
        return RUN
    if needs == "model":
        return model_gate(session)
    if session.settings.tier == "cpu":
        return Gate(action="skip", text="cpu tier: no GPU is checked")
    if needs == "gpu" and session.machine.problem is not None:
        return _not_asked(session)
    if needs == "gpu" and not session.machine.visible:
        # A check that needs the machine says so as a failure; this one has nothing to work on.
        return _lacking(unmet(GpuRequirement(), session.machine) or "", session)
    return RUN


def _not_asked(session: GpuSession) -> Gate:
    return Gate(action="fail", text=f"the GPUs could not be asked: {session.machine.problem}")


def _lacking(text: str, session: GpuSession) -> Gate:
    action: Literal["skip", "fail"] = "fail" if session.settings.demanding else "skip"
    return Gate(action=action, text=text, shortfall=True)


def _simulated(session: GpuSession) -> str:
    return f"simulated {session.settings.simulate}: there is no GPU to run on"
