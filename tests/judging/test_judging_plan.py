"""Verdicts about plans."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pytest_multigpu.judging.plan import judge_context, judge_plan
from pytest_multigpu.records.plan import Architecture, Block, DevicePlan, Plan
from pytest_multigpu.units import GIB

MODEL = Architecture(
    model="tiny",
    model_class="LlamaForCausalLM",
    tier="8bit",
    dtype="bfloat16",
    blocks=(Block(name="model.layers.0", kind="layer", layer=0),),
    hidden_size=1,
    intermediate_size=1,
    layers=1,
    heads=1,
    kv_heads=1,
    head_dim=1,
    vocab_size=1,
)


def device(peak: int, limit: int, name: str = "cuda:0") -> DevicePlan:
    return DevicePlan(
        device=name,
        layers=(0, 0),
        weights_bytes=0,
        kv_bytes=0,
        activation_bytes=0,
        reserve_bytes=0,
        peak_bytes=peak,
        limit_bytes=limit,
    )


PLAN = Plan(
    architecture=MODEL,
    weights="synthetic",
    placement="auto",
    context_tokens=100,
    batch=2,
    fits=True,
    devices=(device(GIB, GIB),),
    device_map={"model.layers.0": 0},
)


def test_a_plan_that_fits() -> None:
    records = judge_plan(PLAN)
    assert [record.outcome for record in records] == ["passed"] * 3
    assert records[0].expected == "tiny in 8bit, auto placement fits"
    assert (records[2].device, records[2].unit) == ("GPU 0", "bytes")


@pytest.mark.parametrize(
    ("peak", "outcome"), [(GIB - 1, "passed"), (GIB, "passed"), (GIB + 1, "failed")]
)
def test_the_limit_is_the_last_byte_that_fits(peak: int, outcome: str) -> None:
    assert judge_plan(replace(PLAN, devices=(device(peak, GIB),)))[2].outcome == outcome


def test_a_plan_that_does_not_fit_is_a_shortfall_with_reason_and_remedy() -> None:
    refused = replace(
        PLAN,
        fits=False,
        reasons=("GPU 1 lacks 2.0 GiB",),
        remedies=("rent 2 x H100",),
        offloaded=("model.layers.0",),
        devices=(device(GIB, GIB), device(3 * GIB, GIB, "cuda:1"), device(5, 0, "cpu")),
    )
    records = judge_plan(refused)
    assert [(r.name, r.outcome) for r in records] == [
        ("plan", "failed"),
        ("offloaded blocks", "failed"),
        ("predicted peak", "passed"),
        ("predicted peak", "failed"),
    ]
    assert all(
        r.shortfall and r.remedy == "rent 2 x H100" for r in records if r.outcome == "failed"
    )
    assert records[0].reason == "GPU 1 lacks 2.0 GiB"
    assert records[1].reason == "the plan puts model.layers.0 on cpu or disk"
    assert records[3].reason == "GPU 1 lacks 2.0 GiB of 3.0 GiB"


def test_nothing_placed_is_not_nothing_offloaded() -> None:
    record = judge_plan(replace(PLAN, fits=False, device_map={}, reasons=("no GPU is visible",)))[1]
    assert (record.outcome, record.shortfall) == ("failed", True)
    assert record.reason == "nothing is placed: no GPU is visible"


def test_without_a_remedy_the_plan_is_pointed_to() -> None:
    record = judge_plan(replace(PLAN, fits=False))[0]
    assert record.reason == "tiny in 8bit, auto placement does not fit"
    assert record.remedy == "pytest --gpu-plan shows what to rent or change"


def test_what_the_plan_does_not_know_is_a_warning() -> None:
    model = replace(MODEL, unknown=("router buffers are not counted",))
    record = judge_plan(replace(PLAN, architecture=model))[-1]
    assert (record.outcome, record.reason) == ("warned", "router buffers are not counted")


def test_a_better_tier_is_a_warning() -> None:
    text = "16bit does not fit with auto placement; --gpu-tier=16bit --gpu-placement=balanced fits"
    record = judge_plan(replace(PLAN, warnings=(text,)))[-1]
    assert (record.name, record.outcome, record.reason) == ("better tier", "warned", text)
    assert len(judge_plan(PLAN)) == 3


@pytest.mark.parametrize(("largest", "measured"), [(101, 101), (100, 100), (99, 100), (0, 100)])
def test_a_plan_that_fits_has_room_whatever_the_search_found(largest: int, measured: int) -> None:
    record = judge_context(PLAN, largest)
    assert (record.outcome, record.measured, record.reason) == ("passed", measured, "")
    assert (record.remedy, record.shortfall) == ("", False)


@pytest.mark.parametrize(
    ("largest", "reason", "remedy"),
    [
        (101, "100 tokens x 2 do not fit: GPU 0 lacks 1.0 GiB", "rent 2 x H100"),
        (100, "100 tokens x 2 do not fit: GPU 0 lacks 1.0 GiB", "rent 2 x H100"),
        (99, "100 tokens x 2 were asked for and 99 fit", "--gpu-context=99"),
        (1, "100 tokens x 2 were asked for and 1 fit", "--gpu-context=1"),
        (0, "100 tokens x 2 were asked for and 0 fit", "rent 2 x H100"),
    ],
)
def test_a_plan_that_does_not_fit_has_no_room(largest: int, reason: str, remedy: str) -> None:
    refused = replace(
        PLAN, fits=False, reasons=("GPU 0 lacks 1.0 GiB",), remedies=("rent 2 x H100",)
    )
    record = judge_context(refused, largest)
    assert (record.outcome, record.measured, record.shortfall) == ("failed", largest, True)
    assert (record.reason, record.remedy) == (reason, remedy)
    bare = judge_context(replace(refused, remedies=(), reasons=()), max(largest, 100))
    assert bare.remedy == "pytest --gpu-plan shows what to rent or change"
    assert bare.reason == "100 tokens x 2 do not fit: the plan does not say why"


def test_units_and_texts_of_a_plan_that_fits() -> None:
    plan, offloaded, peak = judge_plan(PLAN)
    assert (plan.name, plan.measured, plan.unit) == ("plan", "fits", "")
    assert (offloaded.expected, offloaded.measured, offloaded.unit) == (0, 0, "blocks")
    assert (peak.expected, peak.measured) == (GIB, GIB)
    assert {(r.reason, r.remedy, r.shortfall) for r in (plan, offloaded, peak)} == {("", "", False)}


def test_a_plan_that_another_placement_mends_is_no_shortfall() -> None:
    refused = replace(
        PLAN,
        fits=False,
        mendable=True,
        offloaded=("a",),
        devices=(device(GIB + 1, GIB),),
    )
    records = judge_plan(refused)
    assert [r.outcome for r in records] == ["failed"] * 3
    assert [r.shortfall for r in records] == [False] * 3
    assert records[0].measured == "does not fit"
    assert records[2].reason == "GPU 0 lacks 0.0 GiB of 1.0 GiB"
    assert not judge_context(refused, 1).shortfall


@pytest.mark.parametrize(
    ("names", "listed"),
    [
        ("abcd", "a, b, c, d"),
        ("abcde", "a, b, c, d and 1 more"),
        ("abcdefg", "a, b, c, d and 3 more"),
    ],
)
def test_at_most_four_blocks_are_listed(names: str, listed: str) -> None:
    record = judge_plan(replace(PLAN, fits=False, offloaded=tuple(names)))[1]
    assert record.reason == f"the plan puts {listed} on cpu or disk"
    assert (record.measured, record.expected, record.unit) == (len(names), 0, "blocks")


def test_nothing_placed_in_full() -> None:
    record = judge_plan(replace(PLAN, fits=False, device_map={}, remedies=("rent",)))[1]
    assert record.reason == "nothing is placed: there is no device map"
    assert (record.name, record.expected, record.measured) == ("offloaded blocks", 0, None)
    assert (record.unit, record.remedy) == ("blocks", "rent")


def test_the_context_as_a_record() -> None:
    record = judge_context(PLAN, 100)
    assert (record.name, record.unit) == ("largest context", "tokens")
    assert (record.expected, record.measured, record.reason) == (100, 100, "")
