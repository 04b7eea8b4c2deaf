"""What the CUDA worker saw: devices, copies, chains, arithmetic, speeds, and where it stopped.

Imports only the standard library. GPU numbers are CUDA indices; GB is 10**9 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Difference = Literal["", "all zero", "stale", "mixed"]
"""What arrived in place of the bytes sent: ``""`` if nothing differs; ``stale``: the bytes that
lay at the destination before; ``mixed``: neither."""

Link = Literal["NVLink", "PCIe", "CPU", "unknown"]
"""``PCIe``: peer to peer; ``CPU``: no peer access, the driver stages through host memory."""

STARTING = "start"
"""The ``failed_step`` of a worker whose process could not be started."""


@dataclass(frozen=True, kw_only=True)
class TorchVersions:
    """Of the torch that the worker imported, which is the user's own."""

    torch: str
    cuda: str | None
    """The CUDA that torch was built for; None for a CPU build."""
    arch_list: tuple[str, ...] = ()
    """``torch.cuda.get_arch_list()``: ``sm_80``, ``compute_90``."""
    problem: str | None = None
    """Why CUDA could not be initialised, in one line; None if it could."""


@dataclass(frozen=True, kw_only=True)
class WorkerDevice:
    """One GPU as CUDA shows it."""

    index: int
    uuid: str
    """With the ``GPU-`` prefix, as NVML writes it."""
    name: str
    capability: tuple[int, int]
    total_bytes: int
    free_bytes: int
    """Right after the context was made."""


@dataclass(frozen=True, kw_only=True)
class Upload:
    """Host to GPU: every reference on that GPU comes this way."""

    gpu: int
    bytes: int
    equal: bool
    """The position-weighted 64-bit checksum taken on the GPU equals the host's."""
    gb_per_s: float | None = None
    """From pinned memory, warm."""


@dataclass(frozen=True, kw_only=True)
class PairCopy:
    """One way from ``source`` to ``target``, compared on the target with a host-staged copy."""

    source: int
    target: int
    bytes: int
    differing_bytes: int
    first_offset: int | None = None
    kind: Difference = ""
    gb_per_s: float | None = None
    link: Link = "unknown"
    topology: str = ""
    """Nearest common ancestor on PCIe, as ``nvidia-smi topo`` names it: ``PIX``, ``SYS``."""


@dataclass(frozen=True, kw_only=True)
class ChainCopy:
    """A tensor sent along ``order`` without any synchronisation between the hops."""

    order: tuple[int, ...]
    bytes: int
    differing_bytes: int
    first_offset: int | None = None
    kind: Difference = ""
    after_kernel: bool = False
    """Each hop follows a kernel that produces the tensor on the current stream."""
    wrong_hop: tuple[int, int] | None = None
    """The first hop after which the bytes were wrong."""


@dataclass(frozen=True, kw_only=True)
class Product:
    """The same seeded square product on one GPU."""

    gpu: int
    dtype: str
    size: int
    checksum: int
    """Position-weighted 64-bit checksum of the bits of the whole result."""
    relative_error: float
    """Largest error of a spread sample against float64 on the CPU, over the largest value of
    that sample; infinite if the GPU's sample is not finite."""


@dataclass(frozen=True, kw_only=True)
class GpuSpeed:
    """How fast one GPU is by itself."""

    gpu: int
    memory_gb_per_s: float | None = None
    """Copy within the GPU, bytes read plus bytes written."""
    tflop_per_s: float | None = None
    """bf16 products under sustained load, all GPUs at once."""


@dataclass(frozen=True, kw_only=True)
class WorkerStep:
    """One step with its wall-clock start, so that health samples can be joined."""

    name: str
    started: float
    """Seconds since the epoch."""
    seconds: float | None
    """None if it never ended."""
    gpus: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Unmeasured:
    """A step that could not be taken, and why; never a pass."""

    step: str
    gpus: tuple[int, ...]
    reason: str


@dataclass(frozen=True, kw_only=True)
class WorkerReport:
    """All that arrived before the worker ended, hung or died."""

    failure: str | None = None
    """One sentence: it hung, died or failed, at which step and on which GPUs."""
    failed_step: str | None = None
    failed_gpus: tuple[int, ...] = ()
    versions: TorchVersions | None = None
    devices: tuple[WorkerDevice, ...] = ()
    uploads: tuple[Upload, ...] = ()
    pairs: tuple[PairCopy, ...] = ()
    chains: tuple[ChainCopy, ...] = ()
    products: tuple[Product, ...] = ()
    speeds: tuple[GpuSpeed, ...] = ()
    steps: tuple[WorkerStep, ...] = ()
    unmeasured: tuple[Unmeasured, ...] = ()
    unused: frozenset[int] = frozenset()
    """CUDA indices of the GPUs on which this run's plan places nothing."""
    seconds: float = 0.0
    """From the start of the process to its end or its death."""

    def step(self, name: str) -> WorkerStep | None:
        """The step of that name, if it was begun."""
        return next((step for step in self.steps if step.name == name), None)
