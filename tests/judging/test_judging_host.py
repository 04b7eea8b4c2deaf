"""Verdicts on the host: at the limit, one byte under, one over."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pytest_multigpu.judging.host import (
    SMALL_SHM,
    WORKING_BYTES,
    WORKING_BYTES_CPU,
    judge_checkpoint,
    judge_disk,
    judge_host_memory,
    judge_read_speed,
)
from pytest_multigpu.judging.verdict import sentence
from pytest_multigpu.records.host import CheckpointReport, DiskSpace, HostMemory, ReadSpeed
from pytest_multigpu.units import GIB

DISK = DiskSpace(path="/cache", mount="/", total_bytes=200 * GIB, free_bytes=100 * GIB)
MEMORY = HostMemory(
    total_bytes=64 * GIB, available_bytes=60 * GIB, shm_total_bytes=8 * GIB, shm_free_bytes=GIB
)


@pytest.mark.parametrize(("more", "outcome"), [(-1, "passed"), (0, "passed"), (1, "failed")])
def test_disk_at_the_byte(more: int, outcome: str) -> None:
    assert judge_disk(DISK, 100 * GIB + more, required=True).outcome == outcome


def test_disk_texts() -> None:
    record = judge_disk(DISK, 131 * GIB, required=True)
    assert record.reason == "the checkpoint needs 131.0 GiB at /cache; found 100.0 GiB free"
    assert record.shortfall
    warned = judge_disk(DISK, 131 * GIB, required=False)
    assert (warned.outcome, warned.shortfall) == ("warned", False)
    unknown = judge_disk(replace(DISK, free_bytes=None, problem="/: stale"), 1, required=True)
    assert (unknown.outcome, unknown.reason) == (
        "unknown",
        "free space could not be read: /: stale",
    )


def test_checkpoint() -> None:
    whole = CheckpointReport(path="/m", total_bytes=2 * GIB, files=("a", "b"), tensors=9)
    (record,) = judge_checkpoint(whole)
    assert (record.outcome, record.measured) == ("passed", "2 files, 2.0 GiB")
    damaged = replace(
        whole, problems=("/m/a is truncated: 1 of 2 bytes",), fetch="hf download meta/llama"
    )
    (record,) = judge_checkpoint(damaged)
    assert record.outcome == "failed"
    assert sentence(record) == "/m/a is truncated: 1 of 2 bytes; hf download meta/llama"


def test_a_folder_without_weights_is_a_warning() -> None:
    (record,) = judge_checkpoint(
        CheckpointReport(path="/m\n", found=False, fetch="copy or download it again")
    )
    assert (record.outcome, record.reason, record.remedy) == (
        "warned",
        "/m\\n holds no weights: they are synthesised",
        "copy or download it again",
    )


def test_pickled_weights_are_a_warning() -> None:
    (record,) = judge_checkpoint(
        CheckpointReport(path="/m", total_bytes=GIB, files=("a.bin",), pickled=True)
    )
    assert (record.outcome, record.measured, record.reason, record.remedy) == (
        "warned",
        "1 file, 1.0 GiB",
        "/m has its weights as pickles, not as safetensors: transformers' own loader reads them, "
        "several times slower, and their tensors are not checked",
        "load it once and save_pretrained() it, which writes safetensors",
    )


def test_read_speed() -> None:
    speed = ReadSpeed(path="/m/a", bytes_per_second=2e9, method="O_DIRECT")
    record = judge_read_speed(speed, 140_000_000_000)
    assert (record.outcome, record.measured) == (
        "passed",
        "2 GB/s (O_DIRECT): at least 70 s for 130.4 GiB",
    )
    slow = judge_read_speed(replace(speed, bytes_per_second=5e7), 141_000_000_000)
    assert slow.outcome == "warned"
    assert slow.reason == "loading will take at least 47 min: /m/a reads at 0.05 GB/s"
    unknown = judge_read_speed(ReadSpeed(path="", problem="there is no file to read"), 1)
    assert unknown.outcome == "unknown"
    assert unknown.reason == "it could not be measured: there is no file to read"


@pytest.mark.parametrize(("less", "outcome"), [(0, "passed"), (1, "failed")])
def test_offloaded_weights_need_memory_at_the_byte(less: int, outcome: str) -> None:
    memory = replace(MEMORY, available_bytes=10 * GIB + WORKING_BYTES - less)
    record = judge_host_memory(memory, 10 * GIB, gpus=1)[0]
    assert record.outcome == outcome
    assert record.shortfall is (outcome == "failed")


def test_a_machine_that_may_grow_is_only_warned_of() -> None:
    memory = replace(MEMORY, total_bytes=2 * GIB, available_bytes=2 * GIB)
    record = judge_host_memory(memory, 0, gpus=1)[0]
    assert record.outcome == "warned"
    assert record.reason == "needs 4.0 GiB of host memory; the machine has 2.0 GiB"
    capped = replace(memory, limit_bytes=3 * GIB, used_bytes=2 * GIB)
    record = judge_host_memory(capped, 0, gpus=1)[0]
    assert record.outcome == "failed"
    assert record.reason == "needs 4.0 GiB of host memory; its cgroup leaves 1.0 GiB"


def test_without_a_gpu_little_is_enough() -> None:
    memory = replace(MEMORY, available_bytes=WORKING_BYTES_CPU)
    assert [record.outcome for record in judge_host_memory(memory, 0)] == ["passed"]


def test_unknown_memory_is_unknown() -> None:
    memory = HostMemory(total_bytes=None, available_bytes=None)
    outcomes = [record.outcome for record in judge_host_memory(memory, 0, gpus=2)]
    assert outcomes == ["unknown", "unknown"]


@pytest.mark.parametrize(("more", "outcome"), [(0, "warned"), (1, "passed")])
def test_shared_memory_at_the_byte(more: int, outcome: str) -> None:
    memory = replace(MEMORY, shm_total_bytes=SMALL_SHM + more)
    assert judge_host_memory(memory, 0, gpus=2)[1].outcome == outcome
    assert len(judge_host_memory(memory, 0, gpus=1)) == 1
