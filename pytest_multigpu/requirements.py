"""What a test needs of the machine, against what was found. Pure: records, units, errors only."""

from __future__ import annotations

from dataclasses import dataclass

from .records.machine import Gpu, Machine
from .units import gib


@dataclass(frozen=True, kw_only=True)
class GpuRequirement:
    """The arguments of ``@pytest.mark.gpu``, parsed."""

    count: int = 1
    vram_bytes: int | None = None
    """Free on each GPU."""
    total_vram_bytes: int | None = None
    """Free over all visible GPUs together."""
    capability: tuple[int, int] | None = None
    """Compute capability, this or newer."""
    nvlink: bool = False


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the tests of a run want before the first of them runs."""

    worker: bool = False
    """What the CUDA worker measures."""
    model: bool = False
    """A loaded model."""
    plan: bool = False
    """A plan, or what rests on one."""
    ours: bool = False
    """Nothing but the shipped checks: nobody minds when this process gets its CUDA contexts."""
    needs: tuple[GpuRequirement, ...] = ()


def unmet(need: GpuRequirement, machine: Machine) -> str | None:
    """Why the machine does not meet the need: needed, found and which GPU; None if it does.

    ``needs 2 GPUs with 40.0 GiB free each; found 1 (GPU 0: 79.2 GiB free)``
    """
    gpus = machine.visible_gpus
    if not gpus:
        return f"needs {_needed(need)}; found {_hidden(machine)}"
    fitting = [gpu for gpu in gpus if _fits(gpu, need)]
    if len(fitting) < need.count:
        listed = ", ".join(
            f"GPU {position}: {_facts(gpu, need)}" for position, gpu in enumerate(gpus)
        )
        return f"needs {_needed(need)}; found {len(fitting)} ({listed})"
    total = sum(gpu.free_bytes for gpu in gpus if gpu.problem is None)
    if need.total_vram_bytes is not None and total < need.total_vram_bytes:
        listed = ", ".join(
            f"GPU {position}: {_facts(gpu, need)}" for position, gpu in enumerate(gpus)
        )
        return (
            f"needs {gib(need.total_vram_bytes)} free over all GPUs; found {gib(total)} ({listed})"
        )
    return None


def _hidden(machine: Machine) -> str:
    if machine.gpus:
        shown = "" if machine.visible_env is None else f"={machine.visible_env!r}"
        return f"no visible GPU (CUDA_VISIBLE_DEVICES{shown} hides {len(machine.gpus)})"
    return "no GPU"


def _fits(gpu: Gpu, need: GpuRequirement) -> bool:
    if gpu.problem is not None:
        return False
    if need.vram_bytes is not None and gpu.free_bytes < need.vram_bytes:
        return False
    if need.capability is not None and (gpu.capability or (0, 0)) < need.capability:
        return False
    return not need.nvlink or bool(gpu.nvlinks)


def _needed(need: GpuRequirement) -> str:
    several = need.count != 1
    text = f"{need.count} GPUs" if several else "1 GPU"
    qualities = []
    if need.vram_bytes is not None:
        qualities.append(f"{gib(need.vram_bytes)} free" + (" each" if several else ""))
    if need.capability is not None:
        qualities.append(f"compute capability {need.capability[0]}.{need.capability[1]} or newer")
    if need.nvlink:
        qualities.append("NVLink")
    if qualities:
        text += " with " + ", ".join(qualities)
    if need.total_vram_bytes is not None:
        text += f", {gib(need.total_vram_bytes)} free over all"
    return text


def _facts(gpu: Gpu, need: GpuRequirement) -> str:
    if gpu.problem is not None:
        return gpu.problem
    facts = [f"{gib(gpu.free_bytes)} free"]
    if need.capability is not None:
        known = gpu.capability
        facts.append("capability unknown" if known is None else f"capability {known[0]}.{known[1]}")
    if need.nvlink:
        links = gpu.nvlinks
        facts.append("NVLinks unknown" if links is None else f"{links} NVLinks up")
    return ", ".join(facts)
