"""Copies, chains and pair speeds: what fails, on which way, in which words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from pytest_multigpu.judging import interconnect
from pytest_multigpu.judging.thresholds import SLOW_PAIR_SIBLING
from pytest_multigpu.records.worker import PairCopy, WorkerReport

Make = Callable[..., WorkerReport]
JUDGES = (
    interconnect.uploads,
    interconnect.copies,
    interconnect.chains,
    interconnect.pair_bandwidths,
)


def with_pair(report: WorkerReport, source: int, target: int, **changes: object) -> WorkerReport:
    pairs = tuple(
        replace(pair, **changes)  # type: ignore[arg-type]
        if (pair.source, pair.target) == (source, target)
        else pair
        for pair in report.pairs
    )
    return replace(report, pairs=pairs)


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_a_sound_machine_passes(healthy: Make, count: int) -> None:
    for judge in JUDGES:
        records = judge(healthy(count))
        assert records
        assert {record.outcome for record in records} == {"passed"}
    assert len(interconnect.copies(healthy(count))) == max(1, count * (count - 1))


def test_one_gpu_says_that_nothing_was_copied(healthy: Make) -> None:
    (record,) = interconnect.copies(healthy(1))
    assert (record.expected, record.measured) == ("nothing to copy", "1 GPU")


def test_a_wrong_pair_in_words(healthy: Make) -> None:
    report = with_pair(healthy(), 2, 1, differing_bytes=12_345_678, first_offset=0, kind="all zero")
    (record,) = [found for found in interconnect.copies(report) if found.outcome != "passed"]
    assert record.outcome == "failed"
    assert record.device == "GPU 2 -> GPU 1"
    assert record.measured == "12,345,678 differing bytes"
    assert record.reason == (
        "12,345,678 of 67,108,864 bytes differ (all zero) from offset 0: "
        "a tensor moved this way is silently wrong"
    )
    assert "NCCL_P2P_DISABLE=1 does not change .to()" in record.remedy
    assert "tensor.cpu().to(device)" in record.remedy


def test_one_differing_byte_fails(healthy: Make) -> None:
    report = with_pair(healthy(2), 0, 1, differing_bytes=1, first_offset=7, kind="mixed")
    assert [record.outcome for record in interconnect.copies(report)] == ["failed", "passed"]


def test_a_wrong_chain_says_where_it_began(healthy: Make) -> None:
    report = healthy()
    last = replace(
        report.chains[1], differing_bytes=8, first_offset=16, kind="stale", wrong_hop=(1, 2)
    )
    records = interconnect.chains(replace(report, chains=(report.chains[0], last)))
    assert [record.outcome for record in records] == ["passed", "failed"]
    assert records[1].name == "chained copies behind kernels"
    assert records[1].device == "GPU 0 -> GPU 1 -> GPU 2 -> GPU 3 -> GPU 0"
    assert records[1].reason == (
        "8 of 67,108,864 bytes differ (stale) from offset 16, first wrong after GPU 1 -> GPU 2"
    )


def test_a_copy_that_hung_fails_its_pair_and_what_came_after(healthy: Make) -> None:
    report = healthy(
        3, failure="it hung", failed_step="copies", failed_gpus=(0, 2), chains=(), steps=()
    )
    report = replace(report, pairs=report.pairs[:1])
    records = interconnect.copies(report)
    assert [(record.outcome, record.device) for record in records] == [
        ("passed", "GPU 0 -> GPU 1"),
        ("failed", "GPU 0 -> GPU 2"),
    ]
    assert [record.outcome for record in interconnect.chains(report)] == ["failed"]


def test_half_of_the_chains_is_not_a_pass(healthy: Make) -> None:
    report = healthy(failure="it hung", failed_step="chains", failed_gpus=(0, 1, 0))
    outcomes = [record.outcome for record in interconnect.chains(report)]
    assert outcomes == ["passed", "passed", "failed"]


def test_nothing_measured_is_unknown_everywhere_and_a_dead_worker_failed(healthy: Make) -> None:
    for judge in JUDGES:
        for report in (healthy(0), WorkerReport()):
            records = judge(report)
            assert {record.outcome for record in records} == {"unknown"}
            assert all(record.reason for record in records)
        dead = judge(WorkerReport(failure="it died"))
        assert {(record.outcome, record.reason) for record in dead} == {("failed", "it died")}


def test_one_gpu_and_a_dead_worker_is_no_pass(healthy: Make) -> None:
    report = healthy(1, failure="it died", failed_step="contexts")
    assert [record.outcome for record in interconnect.copies(report)] == ["failed"]


def test_missing_pairs_are_unknown(healthy: Make) -> None:
    report = healthy()
    records = interconnect.copies(replace(report, pairs=report.pairs[:-1]))
    assert [record.outcome for record in records] == ["passed"] * 11 + ["unknown"]


@pytest.mark.parametrize(
    ("speed", "outcome"),
    [
        (200.0 * SLOW_PAIR_SIBLING, "passed"),
        (200.0 * SLOW_PAIR_SIBLING - 0.1, "failed"),
    ],
)
def test_a_slow_pair_against_its_siblings(healthy: Make, speed: float, outcome: str) -> None:
    report = with_pair(healthy(), 0, 3, gb_per_s=speed)
    records = interconnect.pair_bandwidths(report)
    (mine,) = [record for record in records if record.device == "GPU 0 -> GPU 3"]
    assert mine.outcome == outcome
    assert {record.outcome for record in records if record is not mine} == {"passed"}
    if outcome == "failed":
        assert mine.reason == (
            "GPU 0 -> GPU 3 copies 99.9 GB/s, pairs with the same link 200.0 GB/s"
        )


def test_pairs_of_another_link_are_not_siblings(healthy: Make) -> None:
    report = healthy()
    for source, target in ((0, 3), (3, 0)):
        report = with_pair(report, source, target, gb_per_s=10.0, link="CPU")
    records = interconnect.pair_bandwidths(report)
    assert {record.outcome for record in records} == {"passed"}
    (mine,) = [record for record in records if record.device == "GPU 0 -> GPU 3"]
    assert mine.name == "copy bandwidth (through the CPU, SYS)"
    assert (mine.measured, mine.unit) == (10.0, "GB/s")


def test_a_crawling_pair_without_siblings_fails(healthy: Make) -> None:
    pair = PairCopy(source=0, target=1, bytes=64, differing_bytes=0, gb_per_s=0.9)
    records = interconnect.pair_bandwidths(healthy(2, pairs=(pair,)))
    assert [record.outcome for record in records] == ["failed", "unknown"]
    assert records[0].reason == "GPU 0 -> GPU 1 copies 0.9 GB/s, slower than any sound link"


def test_a_changed_upload_fails(healthy: Make) -> None:
    report = healthy(2)
    bad = replace(report.uploads[1], equal=False)
    records = interconnect.uploads(replace(report, uploads=(report.uploads[0], bad)))
    assert [record.outcome for record in records] == ["passed", "failed"]
    assert records[1].reason == "67,108,864 bytes from the host arrived changed on GPU 1"


def test_a_slow_pair_counts_only_where_activations_take_it(healthy: Make) -> None:
    slow = with_pair(healthy(4), 1, 2, gb_per_s=20.0)
    assert interconnect.slow_hops(slow, (0, 1, 2, 3, 0)) == ["GPU 1 -> GPU 2"]
    assert interconnect.slow_hops(slow, (0, 2, 1, 0)) == []
    assert interconnect.slow_hops(healthy(4), (0, 1, 2, 3, 0)) == []
    assert interconnect.slow_hops(healthy(1), (0,)) == []
