"""Judging the host: checkpoint, disk, read speed, memory. Pure: readings in, records out.

Imports errors, records and units.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import one_line
from ..records.check import Record
from ..records.host import CheckpointReport, DiskSpace, HostMemory, ReadSpeed
from ..units import GIB, MIB, gib, human_size

WORKING_BYTES = 4 * GIB
"""Host memory of the process itself: torch, CUDA's host side and the loader's buffers."""
WORKING_BYTES_CPU = GIB
"""The same without a GPU, for the cpu tier's tiny model."""
SLOW_LOAD_SECONDS = 900.0
"""A load predicted to take longer is worth a warning."""
_SHM = "/dev/shm"  # noqa: S108  (named to people, not written to)
SMALL_SHM = 64 * MIB
"""Docker's default, in which programs that share memory between processes fail."""


def judge_checkpoint(report: CheckpointReport) -> list[Record]:
    """One record, or one for each problem.

    A folder without weights is a warning: they are synthesised, unless ``--gpu-weights=checkpoint``
    demands them, which ends the run before it starts.
    """
    name = "checkpoint"
    shards = "1 file" if len(report.files) == 1 else f"{len(report.files)} files"
    size = f"{shards}, {human_size(report.total_bytes)}"
    where = one_line(report.path)
    if report.problems:
        return [
            Record(
                name=name,
                outcome="failed",
                expected="complete",
                measured="damaged or incomplete",
                reason=problem,
                remedy=report.fetch,
            )
            for problem in report.problems
        ]
    if not report.found:
        return [
            Record(
                name=name,
                outcome="warned",
                expected="complete",
                measured="no weights",
                reason=f"{where} holds no weights: they are synthesised",
                remedy=report.fetch,
            )
        ]
    if report.pickled:
        return [
            Record(
                name=name,
                outcome="warned",
                expected="safetensors",
                measured=size,
                reason=(
                    f"{where} has its weights as pickles, not as safetensors: transformers' "
                    "own loader reads them, several times slower, and their tensors are not checked"
                ),
                remedy="load it once and save_pretrained() it, which writes safetensors",
            )
        ]
    return [Record(name=name, outcome="passed", expected="complete", measured=size)]


def judge_disk(disk: DiskSpace, need_bytes: int, *, required: bool) -> Record:
    """Is there room for what a download would still add.

    :param need_bytes: bytes of the checkpoint that are not on this machine yet; 0 if it is here.
    :param required: this run needs the checkpoint. Otherwise a lack is a warning.
    """
    name = "disk space"
    if disk.free_bytes is None:
        return Record(
            name=name,
            outcome="unknown",
            expected=need_bytes,
            unit="bytes",
            reason=f"free space could not be read: {disk.problem}",
            remedy=f"df -h {disk.mount}",
        )
    if disk.free_bytes >= need_bytes:
        return Record(
            name=name,
            outcome="passed",
            expected=need_bytes,
            measured=disk.free_bytes,
            unit="bytes",
        )
    return Record(
        name=name,
        outcome="failed" if required else "warned",
        expected=need_bytes,
        measured=disk.free_bytes,
        unit="bytes",
        reason=(
            f"the checkpoint needs {human_size(need_bytes)} at {disk.path}; "
            f"found {human_size(disk.free_bytes)} free"
        ),
        remedy="export HF_HOME=<a folder on a larger disk>, or rent a larger disk",
        shortfall=required,
    )


def judge_read_speed(speed: ReadSpeed, total_bytes: int) -> Record:
    """What the sample predicts for loading ``total_bytes``."""
    name = "read speed"
    if speed.bytes_per_second is None:
        return Record(
            name=name,
            outcome="unknown",
            unit="GB/s",
            reason=f"it could not be measured: {speed.problem}",
        )
    rate = round(speed.bytes_per_second / 1e9, 2)
    seconds = total_bytes / speed.bytes_per_second
    predicted = f"{rate:g} GB/s ({speed.method}): at least {seconds:.0f} s for {gib(total_bytes)}"
    expected = f"loads within {SLOW_LOAD_SECONDS:.0f} s"
    if seconds <= SLOW_LOAD_SECONDS:
        return Record(name=name, outcome="passed", expected=expected, measured=predicted)
    return Record(
        name=name,
        outcome="warned",
        expected=expected,
        measured=predicted,
        reason=(
            f"loading will take at least {seconds / 60:.0f} min: "
            f"{speed.path} reads at {rate:g} GB/s"
        ),
        remedy="copy the checkpoint to a local disk",
    )


def judge_host_memory(memory: HostMemory, offloaded_bytes: int, *, gpus: int = 0) -> list[Record]:
    """Main memory for what the plan offloads and for the process itself, and /dev/shm.

    Where only MemAvailable is short and nothing is offloaded it is a warning: some virtual
    machines start with little memory and grow.

    :param offloaded_bytes: weights that the plan puts on the CPU.
    :param gpus: how many GPUs are used; /dev/shm matters from two on.
    """
    need = offloaded_bytes + (WORKING_BYTES if gpus else WORKING_BYTES_CPU)
    return [_judge_memory(memory, need, offloaded_bytes), *_judge_shm(memory, gpus)]


def _judge_memory(memory: HostMemory, need: int, offloaded: int) -> Record:
    name, usable = "host memory", memory.usable_bytes
    if usable is None:
        return Record(
            name=name,
            outcome="unknown",
            expected=need,
            unit="bytes",
            reason="free host memory could not be read",
            remedy="free -b",
        )
    if usable >= need:
        return Record(name=name, outcome="passed", expected=need, measured=usable, unit="bytes")
    limit = "its cgroup leaves" if memory.limited_by_cgroup else "the machine has"
    what = f" ({gib(offloaded)} of weights on the CPU)" if offloaded else ""
    hard = bool(offloaded) or memory.limited_by_cgroup
    return Record(
        name=name,
        outcome="failed" if hard else "warned",
        expected=need,
        measured=usable,
        unit="bytes",
        reason=f"needs {gib(need)} of host memory{what}; {limit} {gib(usable)}",
        remedy="rent a machine with more memory, or raise the container's limit (docker run -m)",
        shortfall=hard,
    )


def _judge_shm(memory: HostMemory, gpus: int) -> Sequence[Record]:
    if gpus < 2:
        return []
    name, size = _SHM, memory.shm_total_bytes
    if size is None:
        return [
            Record(
                name=name,
                outcome="unknown",
                unit="bytes",
                reason=f"{_SHM} could not be read",
                remedy="df -h /dev/shm",
            )
        ]
    if size > SMALL_SHM:
        return [
            Record(
                name=name,
                outcome="passed",
                expected=SMALL_SHM + 1,
                measured=size,
                unit="bytes",
            )
        ]
    return [
        Record(
            name=name,
            outcome="warned",
            expected=SMALL_SHM + 1,
            measured=size,
            unit="bytes",
            reason=f"{_SHM} has {human_size(size)}; NCCL and data loaders need more",
            remedy="docker run --shm-size=8g",
        )
    ]
