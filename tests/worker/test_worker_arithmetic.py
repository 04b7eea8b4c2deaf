"""Products on CPU stand-ins: a flipped bit shows, references are right."""

from __future__ import annotations

import io
import json
import math
from types import ModuleType
from typing import Any

import pytest
import torch

from pytest_multigpu.machine.cuda import arithmetic
from pytest_multigpu.machine.cuda.backend import CpuBackend
from pytest_multigpu.machine.cuda.copies import make_pattern
from pytest_multigpu.machine.cuda.emitter import Emitter

WORDS = make_pattern(1 << 14).words


def results(out: io.StringIO, kind: str) -> list[dict[str, Any]]:
    events = [json.loads(line) for line in out.getvalue().splitlines()]
    return [event["value"] for event in events if event.get("kind") == kind]


def multiply(faulty: ModuleType, fault: dict[str, Any]) -> list[dict[str, Any]]:
    out = io.StringIO()
    backend = faulty.FaultyBackend(CpuBackend(3), fault)
    arithmetic.products(backend, Emitter(out), dict.fromkeys(range(3), WORDS), WORDS)
    return results(out, "product")


def test_sound_products_agree_and_are_near_float64(faulty: ModuleType) -> None:
    found = multiply(faulty, {"kind": "none"})
    assert [(product["gpu"], product["dtype"]) for product in found] == [
        (gpu, dtype) for dtype in ("bfloat16", "float32") for gpu in range(3)
    ]
    for dtype, most in (("bfloat16", 0.01), ("float32", 1e-6)):
        mine = [product for product in found if product["dtype"] == dtype]
        assert len({product["checksum"] for product in mine}) == 1
        assert all(0 < product["relative_error"] < most for product in mine)


def test_one_flipped_bit_changes_the_checksum_of_that_gpu_only(faulty: ModuleType) -> None:
    found = multiply(faulty, {"kind": "product", "gpu": 1})
    for dtype in ("bfloat16", "float32"):
        sums = [product["checksum"] for product in found if product["dtype"] == dtype]
        assert sums[0] == sums[2] != sums[1]


def test_operands_are_exact_and_finite() -> None:
    left, right = arithmetic.operands(WORDS, "bfloat16", 64)
    assert left.shape == right.shape == (64, 64)
    assert torch.equal(
        (left.double() * 128).to(torch.int8).reshape(-1), WORDS.view(torch.int8)[:4096]
    )
    assert float(left.abs().max()) <= 1.0
    rows, columns = arithmetic.operands(WORDS, "bfloat16", 64, step=4)
    assert torch.equal(rows, left[::4])
    assert torch.equal(columns, right[:, ::4])


@pytest.mark.parametrize(
    ("dtype", "limit", "size"),
    [("bfloat16", 4096, 80), ("bfloat16", 64, 64), ("float32", 4096, 32)],
)
def test_size_is_what_the_words_suffice_for(dtype: str, limit: int, size: int) -> None:
    # 16,384 bytes: sqrt(8192) = 90.5 of int8, sqrt(2048) = 45.3 of int32; in steps of 16.
    assert arithmetic.matrix_size(WORDS, dtype, limit) == size


def test_a_sample_that_is_not_finite_is_infinitely_wrong() -> None:
    sample = torch.tensor([[float("nan")]])
    assert arithmetic.sample_error(sample, torch.ones(1, 2), torch.ones(2, 1)) == math.inf


def test_too_little_free_memory_is_unmeasured_not_slow(faulty: ModuleType) -> None:
    out = io.StringIO()
    backend = faulty.FaultyBackend(CpuBackend(1), {"kind": "full", "gpu": 0})
    arithmetic.memory_speeds(backend, Emitter(out), [0])
    (event,) = [json.loads(line) for line in out.getvalue().splitlines() if "unmeasured" in line]
    assert event["reason"] == "less than 768 MiB free on GPU 0"
    assert results(out, "memory speed") == []


def test_a_slow_gpu_measures_slow(faulty: ModuleType) -> None:
    out = io.StringIO()
    backend = faulty.FaultyBackend(CpuBackend(2), {"kind": "slow", "gpu": 1, "times": 50})
    arithmetic.memory_speeds(backend, Emitter(out), [0, 1], buffer_bytes=1 << 16)
    speeds = {one["gpu"]: one["gb_per_s"] for one in results(out, "memory speed")}
    assert speeds[1] < speeds[0] / 4
