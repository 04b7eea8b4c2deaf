"""The devices under test: real GPUs, or CPU tensors that stand in for them.

Everything that a fault can spoil goes through a backend's methods, so that tests wrap one.
Imports torch inside functions only.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Identity:
    """One device as CUDA shows it."""

    uuid: str
    name: str
    capability: tuple[int, int]
    total_bytes: int


class Backend(Protocol):
    """``count`` devices, numbered as CUDA numbers them."""

    count: int

    def device(self, gpu: int) -> torch.device:
        """Where tensors of this GPU live."""

    def open(self, gpu: int) -> None:
        """Make the context."""

    def identity(self, gpu: int) -> Identity:
        """Who it is; after ``open``."""

    def free_bytes(self, gpu: int) -> int:
        """Free now, as CUDA shows it; after ``open``."""

    def synchronize(self, gpu: int) -> None:
        """Wait for all work queued on it."""

    def host_buffer(self, size_bytes: int) -> torch.Tensor:
        """Pinned host memory, uint8."""

    def upload(self, out: torch.Tensor, host: torch.Tensor, gpu: int) -> None:
        """Host to GPU, queued on the current stream."""

    def copy_into(self, out: torch.Tensor, tensor: torch.Tensor, pair: tuple[int, int]) -> None:
        """One way from ``pair[0]`` into ``out`` on ``pair[1]``, queued."""

    def send(self, tensor: torch.Tensor, pair: tuple[int, int], *, hop: int) -> torch.Tensor:
        """``tensor.to(device)`` as accelerate's hooks do it, queued; hop 0 begins a chain."""

    def copy_within(self, out: torch.Tensor, tensor: torch.Tensor, gpu: int) -> None:
        """A copy that stays on one GPU, queued."""

    def matmul(self, left: torch.Tensor, right: torch.Tensor, gpu: int) -> torch.Tensor:
        """``left @ right``, queued."""

    def seconds_of(self, gpu: int, work: Callable[[], None]) -> float:
        """How long the queued work took on the GPU's current stream; waits for it."""

    def can_access_peer(self, pair: tuple[int, int]) -> bool | None:
        """What the driver says; None where the question makes no sense."""


class CudaBackend:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves visible."""

    def __init__(self) -> None:
        import torch

        self._torch = torch
        self._first = threading.Lock()
        self.count = torch.cuda.device_count()

    def device(self, gpu: int) -> torch.device:
        return self._torch.device("cuda", gpu)

    def open(self, gpu: int) -> None:
        self._torch.cuda.synchronize(gpu)  # makes the context
        # One after the other: with expandable segments the first allocation of a process tries
        # fabric handles, and another GPU's meanwhile fails ("operation not permitted", torch 2.11).
        with self._first:
            self._torch.empty(1, device=self.device(gpu))
        self._torch.cuda.synchronize(gpu)

    def identity(self, gpu: int) -> Identity:
        properties = self._torch.cuda.get_device_properties(gpu)
        uuid = str(getattr(properties, "uuid", ""))
        return Identity(
            uuid=uuid if uuid.startswith(("GPU-", "MIG-")) or not uuid else f"GPU-{uuid}",
            name=properties.name,
            capability=(properties.major, properties.minor),
            total_bytes=properties.total_memory,
        )

    def free_bytes(self, gpu: int) -> int:
        return int(self._torch.cuda.mem_get_info(gpu)[0])

    def synchronize(self, gpu: int) -> None:
        self._torch.cuda.synchronize(gpu)

    def host_buffer(self, size_bytes: int) -> torch.Tensor:
        return self._torch.empty(size_bytes, dtype=self._torch.uint8, pin_memory=True)

    def upload(self, out: torch.Tensor, host: torch.Tensor, gpu: int) -> None:
        out.copy_(host, non_blocking=True)

    def copy_into(self, out: torch.Tensor, tensor: torch.Tensor, pair: tuple[int, int]) -> None:
        out.copy_(tensor, non_blocking=True)

    def send(self, tensor: torch.Tensor, pair: tuple[int, int], *, hop: int) -> torch.Tensor:
        return tensor.to(self.device(pair[1]), non_blocking=True)

    def copy_within(self, out: torch.Tensor, tensor: torch.Tensor, gpu: int) -> None:
        out.copy_(tensor, non_blocking=True)

    def matmul(self, left: torch.Tensor, right: torch.Tensor, gpu: int) -> torch.Tensor:
        return left @ right

    def seconds_of(self, gpu: int, work: Callable[[], None]) -> float:
        # Events must be made, recorded and read with their own GPU current.
        with self._torch.cuda.device(gpu):
            event: Any = self._torch.cuda.Event
            begin, end = event(enable_timing=True), event(enable_timing=True)
            begin.record()
            work()
            end.record()
            end.synchronize()
            return float(begin.elapsed_time(end)) / 1000

    def can_access_peer(self, pair: tuple[int, int]) -> bool | None:
        return bool(self._torch.cuda.can_device_access_peer(*pair))


class CpuBackend:
    """CPU tensors that stand in for ``count`` GPUs: every copy is a real copy."""

    def __init__(self, count: int) -> None:
        import torch

        self._torch = torch
        self.count = count

    def device(self, gpu: int) -> torch.device:
        return self._torch.device("cpu")

    def open(self, gpu: int) -> None:
        self._torch.empty(1)

    def identity(self, gpu: int) -> Identity:
        return Identity(uuid=f"CPU-{gpu}", name="CPU", capability=(0, 0), total_bytes=0)

    def free_bytes(self, gpu: int) -> int:
        return 1 << 40

    def synchronize(self, gpu: int) -> None:
        pass

    def host_buffer(self, size_bytes: int) -> torch.Tensor:
        return self._torch.empty(size_bytes, dtype=self._torch.uint8)

    def upload(self, out: torch.Tensor, host: torch.Tensor, gpu: int) -> None:
        out.copy_(host)

    def copy_into(self, out: torch.Tensor, tensor: torch.Tensor, pair: tuple[int, int]) -> None:
        out.copy_(tensor)

    def send(self, tensor: torch.Tensor, pair: tuple[int, int], *, hop: int) -> torch.Tensor:
        return tensor.clone()

    def copy_within(self, out: torch.Tensor, tensor: torch.Tensor, gpu: int) -> None:
        out.copy_(tensor)

    def matmul(self, left: torch.Tensor, right: torch.Tensor, gpu: int) -> torch.Tensor:
        return left @ right

    def seconds_of(self, gpu: int, work: Callable[[], None]) -> float:
        began = time.perf_counter()
        work()
        return max(time.perf_counter() - began, 1e-9)

    def can_access_peer(self, pair: tuple[int, int]) -> bool | None:
        return None
