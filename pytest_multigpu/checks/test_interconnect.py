"""Copies, arithmetic and speeds of the GPUs, as the CUDA worker measured them."""

from __future__ import annotations

import pytest

from pytest_multigpu.judging import arithmetic, interconnect, worker
from pytest_multigpu.judging.worker import with_failure
from pytest_multigpu.records.check import Record
from pytest_multigpu.records.worker import WorkerReport
from pytest_multigpu.session import GpuSession

pytestmark = [pytest.mark.quick, pytest.mark.check(needs="gpu")]


def test_cuda_worker(gpu_worker: WorkerReport) -> Record:
    """The worker touched every GPU and came through within its limit."""
    return worker.worker_came_through(gpu_worker)


def test_copies(gpu_worker: WorkerReport) -> list[Record]:
    """Every ordered pair, one way, byte for byte against a copy staged through the host."""
    records = interconnect.uploads(gpu_worker) + interconnect.copies(gpu_worker)
    return with_failure(gpu_worker, records)


def test_chained_copies(gpu_worker: WorkerReport) -> list[Record]:
    """Through all GPUs without synchronisation, as a split model's hidden states go."""
    return with_failure(gpu_worker, interconnect.chains(gpu_worker))


def test_copy_bandwidth(gpu_worker: WorkerReport) -> list[Record]:
    """No pair is much slower than the others with the same link."""
    return with_failure(gpu_worker, interconnect.pair_bandwidths(gpu_worker))


def test_arithmetic(gpu_worker: WorkerReport) -> list[Record]:
    """The same products on every GPU, bit for bit, and right."""
    return with_failure(gpu_worker, arithmetic.products(gpu_worker))


def test_speed_under_load(gpu_worker: WorkerReport, gpu_session: GpuSession) -> list[Record]:
    """No GPU computes or copies slower than its siblings or far below its datasheet."""
    readings = gpu_session.health_during(*arithmetic.SPEED_STEPS)
    records = (
        arithmetic.product_speeds(gpu_worker, readings)
        + arithmetic.memory_bandwidths(gpu_worker, readings)
        + arithmetic.host_bandwidths(gpu_worker, readings)
    )
    return with_failure(gpu_worker, records)
