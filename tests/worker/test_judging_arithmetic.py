"""Products and speeds: which GPU is wrong or slow, against siblings and datasheet."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from pytest_multigpu.judging import arithmetic
from pytest_multigpu.judging.thresholds import (
    LEAST_HOST_GB_PER_S,
    LEAST_OF_DATASHEET,
    RELATIVE_ERROR,
    SLOW_SIBLING,
)
from pytest_multigpu.records.worker import WorkerReport

Make = Callable[..., WorkerReport]
JUDGES = (
    arithmetic.products,
    arithmetic.memory_bandwidths,
    arithmetic.product_speeds,
    arithmetic.host_bandwidths,
)


def with_product(report: WorkerReport, gpu: int, **changes: object) -> WorkerReport:
    products = tuple(
        replace(product, **changes)  # type: ignore[arg-type]
        if product.gpu == gpu and product.dtype == "float32"
        else product
        for product in report.products
    )
    return replace(report, products=products)


def with_speed(report: WorkerReport, gpu: int, **changes: Any) -> WorkerReport:
    speeds = tuple(
        replace(speed, **changes) if speed.gpu == gpu else speed for speed in report.speeds
    )
    return replace(report, speeds=speeds)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_sound_machine_passes(healthy: Make, count: int) -> None:
    for judge in JUDGES:
        records = judge(healthy(count))
        assert {record.outcome for record in records} == {"passed"}
        assert len(records) == count * (2 if judge is arithmetic.products else 1)


def test_nothing_measured_is_unknown_and_a_dead_worker_failed(healthy: Make) -> None:
    for judge in JUDGES:
        for report in (healthy(0), WorkerReport()):
            assert {record.outcome for record in judge(report)} == {"unknown"}
        dead = judge(WorkerReport(failure="it died"))
        assert {(record.outcome, record.reason) for record in dead} == {("failed", "it died")}


def test_a_gpu_without_a_result_is_unknown(healthy: Make) -> None:
    report = healthy(4)
    report = replace(
        report,
        products=report.products[:-1],
        speeds=report.speeds[:-1],
        uploads=report.uploads[:-1],
    )
    for judge in JUDGES:
        assert judge(report)[-1].outcome == "unknown"


def failed(report: WorkerReport) -> list[tuple[str, str]]:
    return [
        (record.device, record.reason)
        for record in arithmetic.products(report)
        if record.outcome == "failed"
    ]


def test_the_odd_one_out_is_the_wrong_one(healthy: Make) -> None:
    assert failed(with_product(healthy(), 2, checksum=78)) == [
        ("GPU 2", "GPU 2 has other bits than GPU 0, GPU 1, GPU 3 of the same model")
    ]


def test_of_two_that_disagree_both_are_suspect(healthy: Make) -> None:
    assert [device for device, _ in failed(with_product(healthy(2), 1, checksum=78))] == [
        "GPU 0",
        "GPU 1",
    ]


def test_of_two_the_one_that_is_off_is_the_wrong_one(healthy: Make) -> None:
    report = with_product(healthy(2), 1, checksum=78, relative_error=0.5)
    assert failed(report) == [
        ("GPU 1", "GPU 1 is 0.5 off the CPU's float64 product, more than 2e-05")
    ]


def test_other_models_may_have_other_bits(healthy: Make) -> None:
    report = with_product(healthy(2), 1, checksum=78)
    devices = (report.devices[0], replace(report.devices[1], name="NVIDIA A100-SXM4-80GB"))
    assert failed(replace(report, devices=devices)) == []


@pytest.mark.parametrize(
    ("error", "wrong"),
    [
        (RELATIVE_ERROR["float32"], False),
        (RELATIVE_ERROR["float32"] * 1.01, True),
        (math.inf, True),
        (math.nan, True),
    ],
)
def test_error_at_the_limit(healthy: Make, error: float, wrong: bool) -> None:
    assert bool(failed(with_product(healthy(1), 0, relative_error=error))) is wrong


@pytest.mark.parametrize("field", ["memory_gb_per_s", "tflop_per_s"])
@pytest.mark.parametrize(("share", "outcome"), [(0.0, "passed"), (-0.001, "failed")])
def test_a_slow_sibling(healthy: Make, field: str, share: float, outcome: str) -> None:
    typical, judge, unit = {
        "memory_gb_per_s": (3000.0, arithmetic.memory_bandwidths, "GB/s"),
        "tflop_per_s": (600.0, arithmetic.product_speeds, "TFLOP/s"),
    }[field]
    speed = (SLOW_SIBLING + share) * typical
    records = judge(with_speed(healthy(), 2, **{field: speed}))
    assert [record.outcome for record in records] == ["passed", "passed", outcome, "passed"]
    if outcome == "failed":
        assert records[2].reason == (
            f"GPU 2 reaches {speed:.1f} {unit}, its siblings {typical:.1f} {unit}: "
            "below 80% of them"
        )
        assert "-i 2" in records[2].remedy


@pytest.mark.parametrize(("less", "outcome"), [(0.0, "passed"), (1.0, "failed")])
def test_all_slow_against_the_datasheet(healthy: Make, less: float, outcome: str) -> None:
    speed = LEAST_OF_DATASHEET * 3352 - less
    report = with_speed(healthy(2), 0, memory_gb_per_s=speed)
    report = with_speed(report, 1, memory_gb_per_s=speed)
    records = arithmetic.memory_bandwidths(report)
    assert [record.outcome for record in records] == [outcome] * 2
    if outcome == "failed":
        assert records[0].reason == (
            "GPU 0 reaches 2010.2 GB/s, too little for the 3352 GB/s of its datasheet"
        )


def test_a_card_that_is_not_in_the_table_has_only_siblings(healthy: Make) -> None:
    report = healthy(1)
    report = replace(report, devices=(replace(report.devices[0], name="NVIDIA X1"),))
    (record,) = arithmetic.memory_bandwidths(with_speed(report, 0, memory_gb_per_s=1.0))
    assert (record.outcome, record.expected) == ("passed", "nothing to compare with")


@pytest.mark.parametrize(("less", "outcome"), [(0.0, "passed"), (0.01, "failed")])
def test_host_floor(healthy: Make, less: float, outcome: str) -> None:
    report = healthy(1)
    upload = replace(report.uploads[0], gb_per_s=LEAST_HOST_GB_PER_S - less)
    (record,) = arithmetic.host_bandwidths(replace(report, uploads=(upload,)))
    assert record.outcome == outcome
    if less:
        assert record.reason == "GPU 0 reaches 1.0 GB/s, too little for any sound PCIe link"
