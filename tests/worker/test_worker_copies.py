"""Copies and chains on CPU stand-ins: each planted fault shows as what it is, where it is."""

from __future__ import annotations

import io
import json
from types import ModuleType
from typing import Any

import pytest
import torch

from pytest_multigpu.machine.cuda.backend import CpuBackend
from pytest_multigpu.machine.cuda.copies import (
    POISON_BYTE,
    CopyTest,
    chain_orders,
    checksum,
    compare,
    key_of,
    make_pattern,
)
from pytest_multigpu.machine.cuda.emitter import Emitter, GpuError

COPY_BYTES = 4096


def run(faulty: ModuleType, fault: dict[str, Any], count: int = 3) -> list[dict[str, Any]]:
    """Results of uploads, pairs and chains with that fault."""
    out = io.StringIO()
    backend = faulty.FaultyBackend(CpuBackend(count), fault)
    copies = CopyTest(backend, Emitter(out), make_pattern(COPY_BYTES), range(count))
    copies.upload(torch.empty(COPY_BYTES, dtype=torch.uint8))
    copies.pairs()
    copies.chains()
    events = [json.loads(line) for line in out.getvalue().splitlines()]
    return [
        {"kind of result": event["kind"], **event["value"]}
        for event in events
        if event["event"] == "result"
    ]


def wrong(results: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [
        result
        for result in results
        if result["kind of result"] == kind and result["differing_bytes"]
    ]


@pytest.mark.parametrize(
    ("how", "kind"), [("zero", "all zero"), ("stale", "stale"), ("noise", "mixed")]
)
def test_a_wrong_pair_is_the_only_wrong_pair_and_its_bytes_are_named(
    faulty: ModuleType, how: str, kind: str
) -> None:
    results = run(faulty, {"kind": "copy", "pair": [1, 2], "how": how})
    (pair,) = wrong(results, "pair")
    assert (pair["source"], pair["target"], pair["kind"]) == (1, 2, kind)
    assert pair["first_offset"] == 0
    # Half the words; of zeros and poison a byte in 256 is right by chance.
    assert COPY_BYTES / 2 * 0.95 < pair["differing_bytes"] <= COPY_BYTES / 2
    for chain in wrong(results, "chain"):
        assert chain["wrong_hop"] == [1, 2]
        assert chain["kind"] == kind


def test_a_chain_can_be_wrong_while_every_pair_is_right(faulty: ModuleType) -> None:
    results = run(faulty, {"kind": "chain", "pair": [1, 2], "how": "stale"})
    assert wrong(results, "pair") == []
    chains = wrong(results, "chain")
    assert [(chain["order"], chain["after_kernel"]) for chain in chains] == [
        ([0, 1, 2, 0], False),
        ([0, 1, 2, 0], True),
    ]
    assert all(chain["wrong_hop"] == [1, 2] and chain["kind"] == "stale" for chain in chains)


def test_a_wrong_upload_is_told_by_its_checksum(faulty: ModuleType) -> None:
    results = run(faulty, {"kind": "upload", "gpu": 2})
    uploads = {
        result["gpu"]: result["equal"] for result in results if result["kind of result"] == "upload"
    }
    assert uploads == {0: True, 1: True, 2: False}


def test_an_error_names_the_pair(faulty: ModuleType) -> None:
    with pytest.raises(GpuError) as caught:
        run(faulty, {"kind": "raise", "at": "copy_into", "gpus": [2, 0]})
    assert caught.value.gpus == (2, 0)
    assert str(caught.value) == (
        "RuntimeError: CUDA error: an illegal memory access was encountered"
    )


def test_one_gpu_has_no_pair_and_no_chain(faulty: ModuleType) -> None:
    results = run(faulty, {"kind": "none"}, count=1)
    assert [result["kind of result"] for result in results] == ["upload"]


def test_chain_orders() -> None:
    assert chain_orders([3]) == []
    assert chain_orders([0, 1]) == [(0, 1, 0), (1, 0, 1)]
    assert chain_orders(range(3)) == [(0, 1, 2, 0), (2, 1, 0, 2), (0, 2, 1, 0), (1, 2, 0, 1)]
    assert chain_orders([0, 2, 5]) == [(0, 2, 5, 0), (5, 2, 0, 5), (0, 5, 2, 0), (2, 5, 0, 2)]
    for count in (4, 8):
        orders = chain_orders(range(count))
        assert len(orders) == 4
        for order in orders:
            assert sorted(order[:-1]) == list(range(count))
            assert order[-1] == order[0]


def test_checksum_sees_changed_lost_and_moved_words() -> None:
    words = make_pattern(COPY_BYTES).words
    changed, moved = words.clone(), words.clone()
    changed[17] ^= 1 << 40
    moved[[3, 4]] = words[[4, 3]]
    sums = {checksum(words), checksum(changed), checksum(moved), checksum(words[:-1])}
    assert len(sums) == 4


def test_keys_differ_and_fit_64_bits() -> None:
    keys = [key_of(gpu) for gpu in range(64)]
    assert len(set(keys)) == 64
    assert all(0 < key < 1 << 63 for key in keys)


@pytest.mark.parametrize("at", [0, 1, 4095])
def test_compare_counts_single_bytes_and_says_where(at: int) -> None:
    expected = make_pattern(COPY_BYTES).words
    received = expected.clone()
    assert compare(received, expected) == {
        "differing_bytes": 0,
        "first_offset": None,
        "kind": "",
    }
    data = received.view(torch.uint8)
    data[at] ^= 0x10
    kind = {0: "all zero", POISON_BYTE: "stale"}.get(int(data[at]), "mixed")
    assert compare(received, expected) == {
        "differing_bytes": 1,
        "first_offset": at,
        "kind": kind,
    }
