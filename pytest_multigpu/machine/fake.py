"""A machine for tests: the part of pynvml that this package calls, answered from plain data.

It is held to the same contract tests as the real binding. A card can be lost, midway too, answer
"not supported", raise any NVML error, or hang. Imports the standard library and pynvml's errors.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from ..units import MIB

NOT_SUPPORTED = 3
GPU_IS_LOST = 15
H100_BYTES = 85_520_809_984


@dataclass
class FakeGpu:
    """One card. Change a field to change the answer, also while something polls it."""

    name: str = "NVIDIA H100 80GB HBM3"
    uuid: str = ""
    total: int = H100_BYTES
    used: int = 0
    reserved: int = 480 * MIB
    capability: tuple[int, int] = (9, 0)
    ecc_on: bool = True
    ecc: tuple[int, int] = (0, 0)
    """Uncorrected errors: volatile, aggregate."""
    remapped: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Correctable, uncorrectable, pending, failed."""
    reasons: int = 0
    temperature: int = 40
    pcie: tuple[int, int, int, int] = (5, 5, 16, 16)
    """Generation now and at most, width now and at most."""
    nvlinks: Sequence[bool] = (True,) * 18
    mig: bool = False
    processes: Mapping[int, int | None] = field(default_factory=dict)
    """PID to bytes."""
    errors: dict[str, int] = field(default_factory=dict)
    """Function name to the NVML error code that it raises for this card; ``*`` for all."""


class FakeNvml:
    """Stands in for the module pynvml, with ``gpus``."""

    def __init__(
        self,
        gpus: Sequence[FakeGpu] | int = 4,
        *,
        driver: str = "580.95.05",
        cuda: int = 13000,
        errors: Mapping[str, int] | None = None,
    ) -> None:
        """:param errors: function name to the error code that it raises, whatever the card."""
        import pynvml

        self.NVMLError: type[Exception] = pynvml.NVMLError
        self.gpus = [FakeGpu() for _ in range(gpus)] if isinstance(gpus, int) else list(gpus)
        for number, gpu in enumerate(self.gpus):
            gpu.uuid = gpu.uuid or f"GPU-{number:08x}-0000-4000-8000-{number:012x}"
        self.driver = driver
        self.cuda = cuda
        self.errors = dict(errors or {})
        self.hang: str | None = None
        """The function that never answers, until :attr:`let_go` is set."""
        self.let_go = threading.Event()
        self.calls: list[str] = []
        self.before_call: Callable[[str], None] = lambda function: None
        """Called with every function's name: what loses a card midway."""
        self.opened = 0

    def lose(self, index: int) -> None:
        """The card falls off the bus: it stays counted, and nothing can be asked of it."""
        self.gpus[index].errors["*"] = GPU_IS_LOST

    def _enter(self, function: str, handle: int | None = None) -> FakeGpu:
        self.calls.append(function)
        self.before_call(function)
        if self.hang == function:
            self.let_go.wait()
        if function in self.errors:
            raise self.NVMLError(self.errors[function])
        if not self.opened and function != "nvmlInit":
            raise self.NVMLError(1)
        if handle is None:
            return FakeGpu()
        if not 0 <= handle < len(self.gpus):
            raise self.NVMLError(2)
        gpu = self.gpus[handle]
        code = gpu.errors.get("*", gpu.errors.get(function))
        if code is not None:
            raise self.NVMLError(code)
        return gpu

    def nvmlInit(self) -> None:  # noqa: N802  (the binding's own names, here and below)
        self._enter("nvmlInit")
        self.opened += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self._enter("nvmlShutdown")
        self.opened -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        self._enter("nvmlDeviceGetCount")
        return len(self.gpus)

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        self._enter("nvmlSystemGetDriverVersion")
        return self.driver

    def nvmlSystemGetCudaDriverVersion(self) -> int:  # noqa: N802
        self._enter("nvmlSystemGetCudaDriverVersion")
        return self.cuda

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        self._enter("nvmlDeviceGetHandleByIndex", index)
        return index

    def nvmlDeviceGetMemoryInfo(self, handle: int, version: int | None = None) -> Any:  # noqa: N802
        v2 = "nvmlDeviceGetMemoryInfo_v2"
        name = "nvmlDeviceGetMemoryInfo" if version is None else v2
        gpu = self._enter(name, handle)
        free = gpu.total - gpu.reserved - gpu.used
        if version is None:  # the old structure counts the reserve as used
            return SimpleNamespace(total=gpu.total, free=free, used=gpu.used + gpu.reserved)
        return SimpleNamespace(total=gpu.total, free=free, used=gpu.used, reserved=gpu.reserved)

    def nvmlDeviceGetTotalEccErrors(self, handle: int, error: int, counter: int) -> int:  # noqa: N802
        gpu = self._enter("nvmlDeviceGetTotalEccErrors", handle)
        if not gpu.ecc_on:
            raise self.NVMLError(NOT_SUPPORTED)
        return gpu.ecc[counter] if error == 1 else 0

    def nvmlDeviceGetNvLinkState(self, handle: int, link: int) -> int:  # noqa: N802
        gpu = self._enter("nvmlDeviceGetNvLinkState", handle)
        if not gpu.nvlinks:
            raise self.NVMLError(NOT_SUPPORTED)
        if link >= len(gpu.nvlinks):
            raise self.NVMLError(2)
        return int(gpu.nvlinks[link])

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[Any]:  # noqa: N802
        gpu = self._enter("nvmlDeviceGetComputeRunningProcesses", handle)
        return [SimpleNamespace(pid=pid, usedGpuMemory=u) for pid, u in gpu.processes.items()]

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: int) -> list[Any]:  # noqa: N802
        self._enter("nvmlDeviceGetGraphicsRunningProcesses", handle)
        return []

    def __getattr__(self, function: str) -> Callable[..., Any]:
        """The functions that merely read a field."""
        try:
            answer = _FIELDS[function]
        except KeyError:
            raise AttributeError(function) from None
        return lambda handle, *arguments: answer(self._enter(function, handle))


_FIELDS: dict[str, Callable[[FakeGpu], Any]] = {
    "nvmlDeviceGetName": lambda gpu: gpu.name,
    "nvmlDeviceGetUUID": lambda gpu: gpu.uuid,
    "nvmlDeviceGetCudaComputeCapability": lambda gpu: gpu.capability,
    "nvmlDeviceGetRemappedRows": lambda gpu: gpu.remapped,
    "nvmlDeviceGetCurrentClocksEventReasons": lambda gpu: gpu.reasons,
    "nvmlDeviceGetTemperature": lambda gpu: gpu.temperature,
    "nvmlDeviceGetTemperatureThreshold": lambda gpu: 89,
    "nvmlDeviceGetClockInfo": lambda gpu: 1980,
    "nvmlDeviceGetMaxClockInfo": lambda gpu: 1980,
    "nvmlDeviceGetCurrPcieLinkGeneration": lambda gpu: gpu.pcie[0],
    "nvmlDeviceGetMaxPcieLinkGeneration": lambda gpu: gpu.pcie[1],
    "nvmlDeviceGetCurrPcieLinkWidth": lambda gpu: gpu.pcie[2],
    "nvmlDeviceGetMaxPcieLinkWidth": lambda gpu: gpu.pcie[3],
    "nvmlDeviceGetEccMode": lambda gpu: [int(gpu.ecc_on), int(gpu.ecc_on)],
    "nvmlDeviceGetMigMode": lambda gpu: [int(gpu.mig), int(gpu.mig)],
    "nvmlDeviceGetPowerUsage": lambda gpu: 70_000,
    "nvmlDeviceGetEnforcedPowerLimit": lambda gpu: 700_000,
}

__all__ = ["GPU_IS_LOST", "H100_BYTES", "NOT_SUPPORTED", "FakeGpu", "FakeNvml"]
