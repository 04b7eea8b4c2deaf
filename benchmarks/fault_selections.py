"""Faults beside a choice of checks that does not look at them: the verdict must be red too.

Part of the CPU campaign's table (``fault_table.py``).
"""

from __future__ import annotations

from typing import Any

from benchmarks.fault import Fault, Plant

FOUR: Plant = ("nvml", {})
NONE: Plant = ("nvml", {"gpus": 0})
KILLED = "the CUDA worker died \\(SIGKILL\\) at step 'copies' on GPU 0 -> GPU 1"
FULL = r"not measured: GPU 0 has 1 MiB free; copies and arithmetic need"


def worker(seconds: float | None = None, **fault: Any) -> tuple[Plant, ...]:
    return (FOUR, ("worker", {"fault": fault, "seconds": seconds}))


KILL = worker(kind="kill", at="copy_into", gpus=[0, 1])

SELECTIONS = [
    Fault(
        name="no GPU, only host memory asked",
        issue=3,
        reason=r"this machine has no NVIDIA GPU; rent",
        plants=(NONE,),
        args="-k test_host_memory",
        exit=10,
        fast=True,
    ),
    Fault(
        name="no GPU, only host memory asked, strict in a named tier",
        issue=6,
        reason=r"this machine has no NVIDIA GPU; rent",
        plants=(NONE,),
        args="-k test_host_memory --gpu-tier=16bit --gpu-strict",
        exit=10,
    ),
    Fault(
        name="NVML broken, only the disk asked",
        issue=3,
        reason=r"the GPUs could not be asked: NVML cannot start: Unknown Error",
        plants=(("nvml", {"errors": {"nvmlInit": 999}}),),
        args="-k test_checkpoint_and_disk",
    ),
    Fault(
        name="all GPUs hidden, only host memory asked",
        issue=3,
        reason=r"CUDA_VISIBLE_DEVICES='-1' hides all 4 GPUs",
        plants=(FOUR,),
        env={"CUDA_VISIBLE_DEVICES": "-1"},
        args="-k test_host_memory",
    ),
    Fault(
        name="GPU lost, only host memory asked",
        issue=3,
        reason=r"GPU 2 cannot be read: GPU is lost",
        plants=(("nvml", {"lose": [2]}),),
        args="-k test_host_memory",
    ),
    Fault(
        name="no plan fits, only copies asked",
        issue=3,
        reason=r"blocks would go to the CPU|lacks .* GiB",
        plants=(("nvml", {"gpus": 1}),),
        args="-k test_copies --gpu-tier=16bit",
        exit=10,
        fast=True,
    ),
    Fault(
        name="worker killed, only what it left unmeasured asked",
        issue=3,
        reason=KILLED,
        plants=KILL,
        args='-k "test_chained or test_arithmetic"',
        fast=True,
    ),
    Fault(
        name="worker killed, only health asked",
        issue=3,
        reason=KILLED,
        plants=KILL,
        args="-k test_health",
    ),
    Fault(
        name="worker killed after the copies, only the copies asked",
        issue=3,
        reason=r"the CUDA worker died \(SIGKILL\) at step 'arithmetic' on GPU 0, GPU 1",
        plants=worker(kind="kill", at="matmul", gpus=[1]),
        args="-k test_copies",
    ),
    Fault(
        name="worker hangs, only the driver asked",
        issue=3,
        reason=r"the CUDA worker hung at step 'copies' on GPU 2 -> GPU 3; killed after 8 s",
        plants=worker(8.0, kind="hang", at="copy_into", gpus=[2, 3]),
        args="-k test_driver",
        limit=40.0,
    ),
    Fault(
        name="worker cannot be started",
        issue=3,
        reason=r"the CUDA worker could not be started: .*Resource temporarily unavailable",
        plants=(FOUR, ("no_fork", {})),
        also=(r"it was idle",),
        fast=True,
    ),
    Fault(
        name="no room for the copies",
        issue=3,
        reason=FULL,
        plants=worker(kind="full", gpu=0),
        also=(r"^test_",),
        fast=True,
    ),
    Fault(
        name="no room for the copies, only these asked",
        issue=3,
        reason=FULL,
        plants=worker(kind="full", gpu=0),
        args='-k "test_copies or test_arithmetic"',
        also=(r"^test_",),
    ),
]
