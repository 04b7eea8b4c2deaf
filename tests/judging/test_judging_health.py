"""Verdicts on health: no false red, no false green, unknown stays unknown."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pytest_multigpu.judging.health import judge_health, throttled
from pytest_multigpu.records.health import GpuHealth

FINE = GpuHealth(
    index=0,
    name="H100",
    ecc_volatile=0,
    ecc_aggregate=0,
    remap_pending=False,
    remap_failed=False,
    throttle=0,
    temperature_c=40,
    sm_mhz=1980,
    sm_max_mhz=1980,
    pcie_generation=5,
    pcie_generation_max=5,
    pcie_width=16,
    pcie_width_max=16,
    nvlinks_active=18,
    nvlinks_inactive=0,
    mig=False,
    power_w=300.0,
    samples=5,
    busy_samples=3,
)
TWIN = replace(FINE, index=1)


def test_healthy_gpus_share_their_records() -> None:
    records = judge_health([FINE, TWIN])
    assert [record.outcome for record in records] == ["passed"] * 6
    assert {record.device for record in records} == {"GPU 0, GPU 1"}


@pytest.mark.parametrize(
    ("change", "outcome", "reason"),
    [
        ({"ecc_volatile": 1}, "failed", "1 uncorrected ECC error since the driver was loaded"),
        ({"ecc_aggregate": 3}, "warned", "3 uncorrected ECC errors in the card's life"),
        (
            {"ecc_volatile": None, "ecc_aggregate": None},
            "unknown",
            "the driver does not report ECC errors",
        ),
        (
            {"ecc_volatile": None, "ecc_aggregate": None, "ecc": "off"},
            "unknown",
            "ECC is off, so that nobody counts its memory's errors",
        ),
        (
            {"ecc_volatile": None, "ecc_aggregate": None, "ecc": "none"},
            "unknown",
            "this card has no ECC, so that nobody counts its memory's errors",
        ),
        ({"remap_pending": True}, "failed", "a faulty memory row waits for a reset to be remapped"),
        ({"remap_failed": True}, "failed", "a faulty memory row could not be remapped"),
        (
            {"remap_failed": None, "remap_pending": None},
            "unknown",
            "the driver does not report remapped rows",
        ),
        ({"throttle": 0x8}, "failed", "hardware slowdown (1980 of 1980 MHz, 40 C, 300 W)"),
        ({"throttle": 0x48}, "failed", "hardware thermal slowdown (1980 of 1980 MHz, 40 C, 300 W)"),
        ({"throttle": 0x80}, "failed", "hardware power brake (1980 of 1980 MHz, 40 C, 300 W)"),
        (
            {"throttle": 0x20},
            "warned",
            "the driver lowers the clocks for heat (1980 of 1980 MHz, 40 C, 300 W)",
        ),
        (
            {"throttle": None},
            "unknown",
            "the driver does not report why its clocks are lowered",
        ),
        ({"busy_samples": 0}, "unknown", "it was idle whenever it was read"),
        (
            {"pcie_width": 8},
            "warned",
            "PCIe link at x8 of x16, generation 5 of 5: at most 50% of what the card could have",
        ),
        (
            {"pcie_generation": 3},
            "warned",
            "PCIe link at x16 of x16, generation 3 of 5: at most 25% of what the card could have",
        ),
        ({"pcie_width": None}, "unknown", "the driver does not report its PCIe link"),
        (
            {"nvlinks_active": 16, "nvlinks_inactive": 2},
            "failed",
            "16 of 18 NVLinks up; a sibling has 18",
        ),
        (
            {"nvlinks_active": 1, "nvlinks_inactive": 17},
            "failed",
            "1 of 18 NVLinks up; a sibling has 18",
        ),
        (
            {"nvlinks_active": 0, "nvlinks_inactive": 4},
            "warned",
            "none of 4 NVLinks up; a sibling has 18: a card without a bridge, whose copies go over "
            "PCIe",
        ),
        (
            {"nvlinks_active": None, "nvlinks_inactive": None},
            "unknown",
            "the driver does not report NVLink",
        ),
        ({"mig": True}, "failed", "MIG is on, so CUDA sees a part of the card and not the whole"),
        ({"mig": None}, "unknown", "the driver does not report MIG"),
    ],
)
def test_one_fault_is_one_record_for_its_gpu(
    change: dict[str, object], outcome: str, reason: str
) -> None:
    sick = replace(TWIN, **change)  # type: ignore[arg-type]
    found = [record for record in judge_health([FINE, sick]) if record.outcome != "passed"]
    assert [(r.outcome, r.device, r.reason) for r in found] == [
        (outcome, "GPU 1", f"GPU 1: {reason}")
    ]
    assert found[0].remedy


@pytest.mark.parametrize("throttle", [0x0, 0x4, 0x2, 0x100])
def test_the_power_cap_and_set_clocks_are_normal(throttle: int) -> None:
    rows = [replace(FINE, throttle=throttle)]
    assert {record.outcome for record in judge_health(rows)} == {"passed"}


@pytest.mark.parametrize(("active", "inactive"), [(0, 0), (0, 18)])
def test_no_nvlink_is_no_fault(active: int, inactive: int) -> None:
    rows = [replace(FINE, nvlinks_active=active, nvlinks_inactive=inactive)]
    assert {record.outcome for record in judge_health(rows)} == {"passed"}


def test_links_down_on_a_card_alone_are_a_warning() -> None:
    rows = [replace(FINE, nvlinks_active=16, nvlinks_inactive=2)]
    assert [r.reason for r in judge_health(rows) if r.outcome == "warned"] == [
        "GPU 0: 16 of 18 NVLinks up"
    ]


def test_a_narrow_link_on_all_cards_is_a_warning() -> None:
    rows = [replace(FINE, pcie_width=8), replace(TWIN, pcie_width=8)]
    assert [r.outcome for r in judge_health(rows) if r.name.startswith("PCIe")] == ["warned"]


@pytest.mark.parametrize(("too_slow", "outcome"), [([], "warned"), ([1], "failed")])
def test_a_narrow_link_fails_with_its_bandwidth(too_slow: list[int], outcome: str) -> None:
    rows = [FINE, replace(TWIN, pcie_width=4, pcie_generation=4)]
    judged = judge_health(rows, host_gb_per_s={0: 54.0, 1: 6.71}, too_slow=too_slow)
    (record,) = [r for r in judged if r.name.startswith("PCIe") and r.outcome != "passed"]
    assert (record.outcome, record.reason, record.remedy) == (
        outcome,
        "GPU 1: PCIe link at x4 of x16, generation 4 of 5: 6.7 GB/s from the host, at most 12% of "
        "what the card could have",
        "reseat the card if its slot has x16, or rent another machine",
    )


def test_a_whole_link_passes_however_slow_the_copies() -> None:
    """They have a record of their own."""
    judged = judge_health([FINE, TWIN], host_gb_per_s={1: 3.0}, too_slow=[1])
    assert {record.outcome for record in judged} == {"passed"}


def test_an_idle_link_may_be_slow() -> None:
    rows = [replace(FINE, pcie_generation=1, busy_samples=0)]
    (record,) = [r for r in judge_health(rows) if r.name.startswith("PCIe")]
    assert record.outcome == "unknown"


def test_a_gpu_that_cannot_be_asked_is_red() -> None:
    lost = GpuHealth(index=1, problem="GPU 1 cannot be read: GPU is lost")
    records = judge_health([FINE, lost], {0: "GPU 1 (nvidia-smi 0)", 1: "GPU 0 (nvidia-smi 1)"})
    assert records[0].outcome == "failed"
    assert records[0].device == "GPU 0 (nvidia-smi 1)"
    assert {record.device for record in records[1:]} == {"GPU 1 (nvidia-smi 0)"}


def test_throttled_names_the_gpu_and_why() -> None:
    hot = replace(TWIN, throttle=0x40)
    assert throttled([FINE, hot], {1: "GPU 0 (nvidia-smi 1)"}) == [
        "GPU 0 (nvidia-smi 1) (hardware thermal slowdown)"
    ]
    assert throttled([hot], {}) == ["GPU 1 (hardware thermal slowdown)"]
    power_cap, idle = replace(FINE, throttle=0x4), replace(FINE, throttle=0x1, busy_samples=0)
    unknown, lost = replace(FINE, throttle=None), replace(hot, problem="GPU is lost")
    assert throttled([FINE, power_cap, idle, unknown, lost], {}) == []
