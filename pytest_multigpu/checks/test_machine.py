"""Is this machine what it claims to be: GPUs, visibility, VRAM, health, driver, disk, memory.

All quick: nothing is loaded and this process makes no CUDA context.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from pytest_multigpu.judging import driver as judge_torch
from pytest_multigpu.judging import host as judge_host
from pytest_multigpu.judging import vram as judge_vram
from pytest_multigpu.judging.arithmetic import slow_from_host
from pytest_multigpu.judging.health import judge_health
from pytest_multigpu.judging.machine import judge_gpus, label
from pytest_multigpu.judging.visibility import judge_cuda, judge_environment
from pytest_multigpu.judging.worker import with_failure
from pytest_multigpu.machine import host
from pytest_multigpu.machine.checkpoint import check_checkpoint, find_checkpoint
from pytest_multigpu.machine.holders import wait_for_free
from pytest_multigpu.machine.torch_build import read_torch_build
from pytest_multigpu.machine.visibility import read_environment, visibility_of
from pytest_multigpu.options import Settings
from pytest_multigpu.presets import HUB_IDS, preset_name
from pytest_multigpu.records.check import Record
from pytest_multigpu.records.health import FreeMemory, GpuHealth
from pytest_multigpu.records.machine import Machine
from pytest_multigpu.records.plan import Plan
from pytest_multigpu.records.worker import WorkerReport
from pytest_multigpu.session import GpuSession

pytestmark = pytest.mark.quick


@pytest.mark.check(needs="machine")
def test_gpus(gpu_inventory: Machine) -> list[Record]:
    """There are GPUs, each can be read, they are of one model, and no variable hides any."""
    records = judge_gpus(gpu_inventory)
    if gpu_inventory.problem is None:
        environment = read_environment(os.environ)
        visibility = visibility_of(gpu_inventory, environment)
        records += judge_environment(gpu_inventory, visibility, environment)
    return records


@pytest.mark.check(needs="gpu")
def test_free_vram(
    gpu_inventory: Machine,
    gpu_plan: Plan,
    gpu_settings: Settings,
    gpu_session: GpuSession,
    request: pytest.FixtureRequest,
) -> list[Record]:
    """What the plan needs is free on each GPU, as measured before we used any."""
    rows = [
        FreeMemory(
            gpu=gpu.index,
            total_bytes=gpu.total_bytes,
            free_bytes=gpu.free_bytes,
            used_bytes=gpu.used_bytes,
            reserved_bytes=gpu.reserved_bytes,
            problem=gpu.problem,
        )
        for gpu in gpu_inventory.visible_gpus
    ]
    needs = {
        gpu_inventory.visible[int(device.device.removeprefix("cuda:"))]: device.peak_bytes
        for device in gpu_plan.devices
        if device.device.startswith("cuda:")
    }
    waited = 0.0
    held = [row for row in rows if row.used_bytes > judge_vram.HELD_LIMIT]
    fits = {"plan_fits": gpu_plan.fits, "fits_if_freed": gpu_session.fits_if_freed}
    short = [row for row in rows if judge_vram.lacks_memory(row, needs.get(row.gpu), **fits)]
    if held or short:
        request.getfixturevalue("gpu_worker")  # its own contexts are gone once it has ended
        wanted = {row.gpu: judge_vram.wanted_bytes(row, needs.get(row.gpu)) for row in held + short}
        seconds = gpu_settings.wait_seconds if short else 0.0
        fresh, waited = wait_for_free(wanted, seconds)
        by_gpu = {row.gpu: row for row in fresh}
        rows = [by_gpu.get(row.gpu, row) for row in rows]
    return judge_vram.judge_free_memory(gpu_inventory, rows, needs, waited=waited, **fits)


@pytest.mark.check(needs="gpu")
def test_driver(gpu_inventory: Machine, gpu_worker: WorkerReport) -> list[Record]:
    """The driver serves this torch, and this torch has kernels for every GPU."""
    versions = gpu_worker.versions
    torch, cuda = read_torch_build()
    arch_list: Sequence[str] = versions.arch_list if versions else ()
    problem = versions.problem if versions else None
    records = [
        *judge_torch.judge_driver(gpu_inventory, torch, cuda, problem),
        *judge_torch.judge_architectures(gpu_inventory, arch_list),
    ]
    return with_failure(gpu_worker, records)


@pytest.mark.check(needs="gpu")
def test_visibility(gpu_inventory: Machine, gpu_worker: WorkerReport) -> list[Record]:
    """CUDA sees the GPUs that NVML lists and the environment leaves visible."""
    visibility = visibility_of(gpu_inventory, read_environment(os.environ))
    uuids = [device.uuid for device in sorted(gpu_worker.devices, key=lambda one: one.index)]
    record = judge_cuda(gpu_inventory, visibility, uuids or None, gpu_worker.failure)
    return with_failure(gpu_worker, [record])


@pytest.mark.check(needs="gpu")
def test_health(
    gpu_inventory: Machine, gpu_health: Sequence[GpuHealth], gpu_worker: WorkerReport
) -> list[Record]:
    """No ECC errors, no rows to remap, no throttling, full links, as read under load."""
    labels = {gpu.index: label(gpu) for gpu in gpu_inventory.gpus}
    nvml = dict(enumerate(gpu_inventory.visible))
    known = [one for one in gpu_worker.uploads if one.gpu in nvml]
    measured = {nvml[one.gpu]: one.gb_per_s for one in known if one.gb_per_s is not None}
    too_slow = [nvml[gpu] for gpu in slow_from_host(gpu_worker) if gpu in nvml]
    records = judge_health(gpu_health, labels, host_gb_per_s=measured, too_slow=too_slow)
    return with_failure(gpu_worker, records)


@pytest.mark.check(needs="host")
def test_checkpoint_and_disk(
    gpu_settings: Settings, gpu_plan: Plan, gpu_session: GpuSession
) -> list[Record]:
    """The checkpoint is complete, or there is room for it; how long it takes to read."""
    found = None
    if gpu_plan.weights == "checkpoint":
        found = gpu_session.plans.resolved.checkpoint  # the one that is loaded
    elif gpu_settings.weights != "synthetic":
        found = find_checkpoint(gpu_settings.model, os.environ, _hub_ids(gpu_settings.model))
    if found is None:
        required = gpu_settings.weights == "checkpoint"
        disk = host.read_disk(host.hub_cache(os.environ))
        need = gpu_plan.architecture.parameters * 2
        return [judge_host.judge_disk(disk, need, required=required)]
    report = check_checkpoint(found)
    records = judge_host.judge_checkpoint(report)
    missing = gpu_plan.architecture.parameters * 2 - report.total_bytes
    need = 0 if report.complete else max(0, missing)
    disk = host.read_disk(found)
    records.append(judge_host.judge_disk(disk, need, required=report.found))
    if report.complete:
        speed = host.sample_read_speed([Path(found, name) for name in report.files])
        records.append(judge_host.judge_read_speed(speed, report.total_bytes))
    return records


@pytest.mark.check(needs="host")
def test_host_memory(gpu_plan: Plan, gpu_inventory: Machine) -> list[Record]:
    """Main memory for this process and for what the plan puts on the CPU."""
    offloaded = sum(device.weights_bytes for device in gpu_plan.devices if device.device == "cpu")
    return judge_host.judge_host_memory(
        host.read_host_memory(), offloaded, gpus=len(gpu_inventory.visible)
    )


def _hub_ids(model: str) -> Sequence[str]:
    preset = preset_name(model)
    return HUB_IDS.get(preset, ()) if preset else ()
