"""The machine as read or simulated: GPUs, what is visible, in which CUDA order."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU. A GPU that could not be read stays as a row, with ``problem`` saying why."""

    index: int
    """NVML index: the number ``nvidia-smi`` shows."""
    cuda_index: int | None
    """``i`` in ``cuda:i`` for this environment; None if CUDA_VISIBLE_DEVICES hides it."""
    uuid: str
    name: str
    total_bytes: int
    """As NVML reports it; an "80 GB" H100 has 85,520,809,984 (79.6 GiB)."""
    free_bytes: int
    """Neither used nor reserved by the driver."""
    used_bytes: int = 0
    reserved_bytes: int = 0
    """Held by the driver itself (480 MiB on an idle H100); in neither free nor used."""
    capability: tuple[int, int] | None = None
    """CUDA compute capability, ``(9, 0)`` on an H100; None if unknown."""
    nvlinks: int | None = None
    """NVLinks that are up; 0 if the card has none, None if unknown."""
    problem: str | None = None
    remedy: str = ""
    """What to do about ``problem``; empty where there is nothing better than to rent another."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The GPUs of a machine. "No GPU" is ``gpus == ()`` with ``problem is None``;
    "detection broke" is ``problem``, a sentence."""

    gpus: tuple[Gpu, ...] = ()
    driver: str | None = None
    """Driver version, ``580.159.04``."""
    cuda: str | None = None
    """The newest CUDA that the driver serves, ``13.0``."""
    visible: tuple[int, ...] = ()
    """NVML indices in CUDA order: ``cuda:i`` is ``visible[i]``."""
    order_problem: str | None = None
    """Why the order of ``visible`` is a guess: of mixed cards CUDA did not tell its own. A plan
    may then be for other cards. The end of a sentence that begins "CUDA"."""
    visible_env: str | None = None
    """CUDA_VISIBLE_DEVICES as it was found; None if unset."""
    expandable_segments: bool = False
    """Whether torch's allocator grows its segments in this process's environment
    (``PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True``): less is lost between them."""
    simulated: str | None = None
    """The spec of a machine that isn't there (``4xA6000``)."""
    problem: str | None = None

    @property
    def visible_gpus(self) -> tuple[Gpu, ...]:
        """The GPUs that CUDA sees, in CUDA order, unreadable ones included."""
        by_index = {gpu.index: gpu for gpu in self.gpus}
        return tuple(by_index[index] for index in self.visible)

    def idle(self) -> Machine:
        """The machine as it would be if nobody used it."""
        gpus = tuple(
            replace(gpu, used_bytes=0, free_bytes=gpu.free_bytes + gpu.used_bytes)
            for gpu in self.gpus
        )
        return replace(self, gpus=gpus)
