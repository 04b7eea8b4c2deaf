"""Memory that others hold, before the plan: is it worth waiting for."""

from __future__ import annotations

import time

import pytest

from pytest_multigpu.machine import nvml
from pytest_multigpu.machine.fake import FakeGpu, FakeNvml
from pytest_multigpu.options import Settings
from pytest_multigpu.requirements import Wanted
from pytest_multigpu.session import GpuSession
from pytest_multigpu.units import GIB


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    """The only one of the machine: an H100."""
    fake = FakeNvml(1)
    monkeypatch.setattr(nvml, "load_nvml", lambda: fake)
    return fake.gpus[0]


def session(tier: str, wait: float = 0.0) -> GpuSession:
    settings = Settings(tier=tier, wait_seconds=wait)  # type: ignore[arg-type]
    return GpuSession(settings, {})


@pytest.mark.parametrize(
    ("tier", "used", "fits", "freed"),
    [
        ("4bit", 0, True, True),
        ("4bit", 2 * GIB, True, True),
        ("4bit", 60 * GIB, False, True),
        ("16bit", 60 * GIB, False, False),
        ("16bit", 0, False, False),
        ("auto", 60 * GIB, False, True),
    ],
)
def test_would_it_fit_if_nobody_else_held_memory(
    card: FakeGpu, tier: str, used: int, fits: bool, freed: bool
) -> None:
    card.used = used
    run = session(tier)
    assert (run.plan.fits, run.fits_if_freed) == (fits, freed)


def test_it_is_found_anew_with_the_machine(card: FakeGpu) -> None:
    card.used = 60 * GIB
    run = session("4bit")
    assert not run.plan.fits
    assert run.fits_if_freed
    card.used = 0
    run.look_again()
    assert run.plan.fits
    assert run.fits_if_freed
    assert run.machine.idle() == run.machine


@pytest.mark.parametrize(("tier", "least", "most"), [("4bit", 1.0, 5.0), ("16bit", 0.0, 1.0)])
def test_only_memory_that_would_help_is_waited_for(
    card: FakeGpu, tier: str, least: float, most: float
) -> None:
    card.used = 60 * GIB
    run = session(tier, wait=1.0)
    assert not run.plan.fits  # not on the clock
    assert run.fits_if_freed is (tier == "4bit")
    began = time.monotonic()
    run.start(Wanted(plan=True))
    assert least <= time.monotonic() - began < most
