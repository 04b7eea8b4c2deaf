"""The longest context under balanced: no shorter than what fits, and its plan fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from pytest_multigpu.planning.balance import balanced_plan
from pytest_multigpu.planning.fit import largest_context
from pytest_multigpu.planning.longest import longest_balanced
from pytest_multigpu.planning.partition import place_groups, units
from pytest_multigpu.planning.peaks import Predictor
from pytest_multigpu.planning.simulate import simulate
from pytest_multigpu.records.machine import Machine
from pytest_multigpu.records.plan import Architecture, Plan

Make = Callable[..., Architecture]
SHAPE = {"layers": 8, "hidden": 2048, "intermediate": 8192, "heads": 16, "kv_heads": 4}


@pytest.mark.parametrize("spec", ["1x4GiB", "2x2GiB", "1x2GiB+1x3GiB"])
def test_it_fits_and_is_no_shorter_than_balanced_for_what_was_asked(
    spec: str, make_llama: Make
) -> None:
    model, machine = make_llama(**SHAPE, vocab=4000), simulate(spec)
    asked = balanced_plan(model, machine, 512, 1)
    assert asked is not None
    assert asked.fits
    made = longest_balanced(model, machine, batch=1, near=512, spread=balanced_plan)
    assert made is not None
    assert made.fits
    assert made.placement == "balanced"
    as_placed = largest_context(model, asked.device_map, machine, known=512)
    assert made.context_tokens >= min(as_placed, 512)
    if len(machine.visible) == 1:
        # One map only, searched in two rounds, the second from where the first ended: what fits is
        # not one stretch.
        again = largest_context(model, asked.device_map, machine, known=as_placed)
        assert made.context_tokens == again >= as_placed
    # One that is far too long to begin with is no obstacle.
    other = longest_balanced(model, machine, batch=1, near=120_000, spread=balanced_plan)
    assert other is not None
    assert other.fits


def test_where_it_ends(make_llama: Make) -> None:
    model, machine = make_llama(**SHAPE, vocab=4000), simulate("1x80GiB")
    short = replace(model, max_context=300)
    for near in (10, 300, 5000):
        made = longest_balanced(short, machine, batch=1, near=near, spread=balanced_plan)
        assert made is not None
        assert made.context_tokens == 300
    made = longest_balanced(model, machine, batch=1, near=10, most=77, spread=balanced_plan)
    assert made is not None
    assert made.context_tokens == 77
    assert (
        longest_balanced(model, simulate("1x1GiB"), batch=1, near=9, spread=balanced_plan) is None
    )
    none = Machine()
    assert longest_balanced(model, none, batch=1, near=9, spread=balanced_plan) is None


def test_what_fits_placed_in_another_way_is_no_longer(make_llama: Make) -> None:
    """The search from what was asked may end early: what fits is not one stretch."""
    model, machine = make_llama(**SHAPE, vocab=4000), simulate("2x2GiB")
    known = 4000

    def spread(model: Architecture, machine: Machine, tokens: int, batch: int) -> Plan | None:
        if tokens >= known:
            return balanced_plan(model, machine, tokens, batch)
        lopsided = place_groups(model, units(model), [6, 2])
        made = Predictor(model, lopsided, machine)
        return made.plan(context_tokens=tokens, batch=batch, placement="balanced")

    lopsided = longest_balanced(model, machine, batch=1, near=512, spread=spread)
    assert lopsided is not None
    assert lopsided.context_tokens < known
    made = longest_balanced(model, machine, batch=1, near=512, known=known, spread=spread)
    assert made is not None
    assert made.fits
    assert made.context_tokens >= known
    for further in (lopsided.context_tokens, 1):
        same = longest_balanced(model, machine, batch=1, near=512, known=further, spread=spread)
        assert same == lopsided
