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
from pytest_multigpu.judging.throttling import how_it_ran
from pytest_multigpu.records.health import GpuHealth
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
            "below 80% of them; NVML did not say how it ran meanwhile"
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
            "GPU 0 reaches 2010.2 GB/s, too little for the 3352 GB/s of its datasheet; "
            "NVML did not say how it ran meanwhile"
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
        assert record.reason == (
            "GPU 0 reaches 1.0 GB/s, too little for any sound PCIe link; NVML did not say how it "
            "ran meanwhile"
        )


def ran(index: int, **changes: Any) -> GpuHealth:
    base = GpuHealth(
        index=index,
        throttle=0,
        temperature_c=60 + index,
        sm_mhz=1965 + 5 * index,
        sm_max_mhz=1980,
        power_w=640.4 + index,
        pcie_width=16,
        pcie_width_max=16,
        pcie_generation=5,
        pcie_generation_max=5,
    )
    return replace(base, **changes)


def test_a_slow_sibling_is_shown_as_it_ran(healthy: Make) -> None:
    readings = {i: ran(i) for i in range(4)}
    readings[2] = ran(2, sm_mhz=990, temperature_c=91, power_w=400.0, throttle=0x44)
    report = with_speed(healthy(), 2, tflop_per_s=300.0, memory_gb_per_s=2000.0)
    expected = (
        "below 80% of them; it ran at 990 of 1980 MHz, 91 C, 400 W, hardware thermal slowdown, at "
        "the power cap; its siblings at 1965 to 1980 of 1980 MHz, 60 to 63 C, 640 to 643 W, not "
        "slowed"
    )
    for judge in (arithmetic.product_speeds, arithmetic.memory_bandwidths):
        (slow,) = [one for one in judge(report, readings) if one.outcome == "failed"]
        assert slow.device == "GPU 2"
        assert slow.reason.endswith(expected)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"problem": "GPU is lost"}, "NVML did not say how it ran meanwhile"),
        ({"throttle": None}, "it ran at 1965 of 1980 MHz, 60 C, 640 W, throttle reasons unknown"),
        ({"sm_max_mhz": None}, "it ran at 1965 MHz, 60 C, 640 W, not slowed"),
        (
            {"sm_mhz": None, "temperature_c": None, "power_w": None},
            "it ran at unknown clocks, not slowed",
        ),
        ({"throttle": 0x22}, "640 W, slowed by the driver for heat, at clocks that somebody set"),
    ],
)
def test_what_nvml_does_not_say_is_unknown(changes: dict[str, Any], words: str) -> None:
    assert how_it_ran(0, [1], {0: ran(0, **changes)}).endswith(words)


def test_a_slow_host_copy_is_shown_with_its_link(healthy: Make) -> None:
    readings = {0: ran(0), 1: ran(1, pcie_width=4, pcie_generation=None), 2: ran(2)}
    report = healthy(3)
    uploads = (*report.uploads[:1], replace(report.uploads[1], gb_per_s=13.5), report.uploads[2])
    report = replace(report, uploads=uploads)
    (slow,) = [
        one for one in arithmetic.host_bandwidths(report, readings) if one.outcome == "failed"
    ]
    assert slow.reason == (
        "GPU 1 reaches 13.5 GB/s, its siblings 54.0 GB/s: below 40% of them; its PCIe link ran at "
        "x4 of x16, generation ? of 5; its siblings at x16 of x16, generation 5 of 5"
    )
    assert arithmetic.slow_from_host(report) == [1]


@pytest.mark.parametrize(("speed", "slow"), [(54.0 * 0.4, []), (54.0 * 0.4 - 0.01, [1])])
def test_half_of_the_lanes_is_enough_from_the_host(
    healthy: Make, speed: float, slow: list[int]
) -> None:
    report = healthy(2)
    uploads = (report.uploads[0], replace(report.uploads[1], gb_per_s=speed))
    assert arithmetic.slow_from_host(replace(report, uploads=uploads)) == slow
