"""Bytes in use as someone other than torch sees them: NVML for GPUs, RSS for ``cpu``.

torch, pynvml and psutil are imported in functions. Makes no CUDA context.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

INTERVAL_SECONDS = 0.02
"""Between readings. The allocator's reserve only grows within a phase, so the reading at the end
of the phase counts most; the thread catches what comes and goes."""
SHARE = 0.005
"""At most this share of the time goes into reading: slow drivers are asked less often."""

Whose = Literal["ours", "others", "unknown"]


@dataclass(frozen=True, kw_only=True)
class Shares:
    """One GPU at one moment."""

    used_bytes: int
    others_bytes: int
    """Of processes that NVML lists and that are neither this one nor come from it."""
    hidden_bytes: int
    """Of nobody that is known by what NVML lists; in a container that may be this very process."""

    @property
    def mine_bytes(self) -> int:
        """Whatever is not known to be of others."""
        return self.used_bytes - self.others_bytes


class Witness:
    """Reads one device at a time."""

    def __init__(self, devices: Sequence[str]) -> None:
        """:param devices: ``cuda:<CUDA index>`` or ``cpu``."""
        self.devices = tuple(devices)
        self._handles: dict[str, Any] = {}
        self._nvml: Any = None
        self._known: dict[int, Whose] = {}
        indices = [index_of(device) for device in devices if device != "cpu"]
        if indices and cuda_ready():
            self._join(indices)

    def _join(self, indices: Sequence[int]) -> None:
        """NVML index is not CUDA index: join by UUID."""
        import torch

        try:
            import pynvml
        except ImportError:
            return
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError:
            return
        self._nvml = pynvml
        weakref.finalize(self, _shutdown, pynvml)
        for index in indices:
            uuid = str(getattr(torch.cuda.get_device_properties(index), "uuid", ""))
            with contextlib.suppress(pynvml.NVMLError):
                self._handles[f"cuda:{index}"] = pynvml.nvmlDeviceGetHandleByUUID(
                    uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
                )

    def read(self, device: str) -> int | None:
        """Bytes in use now; None if nobody can say."""
        if device == "cpu":
            return _resident_bytes()
        handle = self._handles.get(device)
        if handle is None:
            return None
        try:
            # The second version keeps the driver's own reserve out of ``used``.
            memory = self._nvml.nvmlDeviceGetMemoryInfo(handle, version=self._nvml.nvmlMemory_v2)
        except self._nvml.NVMLError:
            return None
        return int(memory.used)

    def shares(self, device: str) -> Shares | None:
        """Bytes in use on a GPU now, and whose; None if nobody can say."""
        handle = self._handles.get(device)
        if handle is None:
            return None
        used = self.read(device)
        try:
            if used is None:  # a driver without the second version
                used = int(self._nvml.nvmlDeviceGetMemoryInfo(handle).used)
        except self._nvml.NVMLError:
            return None
        listed = self._listed(handle)
        others = sum(size for pid, size in listed.items() if self._whose(pid) == "others")
        ours = sum(size for pid, size in listed.items() if self._whose(pid) == "ours")
        hidden = max(0, used - others - ours)
        return Shares(used_bytes=used, others_bytes=others, hidden_bytes=hidden)

    def _listed(self, handle: Any) -> dict[int, int]:
        found: dict[int, int] = {}
        for kind in ("Compute", "Graphics"):
            try:
                processes = getattr(self._nvml, f"nvmlDeviceGet{kind}RunningProcesses")(handle)
            except self._nvml.NVMLError:
                continue  # the driver does not tell: it is hidden then
            for process in processes:
                found[int(process.pid)] = int(process.usedGpuMemory or 0)
        return found

    def _whose(self, pid: int) -> Whose:
        """Found once: a process that has lost its parent stays whose it was.

        A number that is no process here may be this very one's number outside a container.
        """
        if pid not in self._known:
            here = Path(f"/proc/{pid}").exists()
            ours = _comes_from(pid, os.getpid())
            self._known[pid] = "ours" if ours else "others" if here else "unknown"
        return self._known[pid]


def _comes_from(pid: int, ancestor: int) -> bool:
    seen: set[int] = set()
    while pid > 1 and pid not in seen:
        if pid == ancestor:
            return True
        seen.add(pid)
        try:
            status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return False
        pid = int(status.rpartition(")")[2].split()[1])
    return False


class Sampler:
    """Calls ``read`` again and again in a thread, and once more at the end."""

    def __init__(self, sample: Callable[[], bool]) -> None:
        """:param sample: takes one reading of every device; False if there is nothing to read."""
        self._sample = sample
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="peak-meter", daemon=True)

    def start(self) -> None:
        if self._sample():
            self._thread.start()

    def finish(self) -> None:
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._sample()

    def _run(self) -> None:
        pause = INTERVAL_SECONDS
        while not self._stop.wait(pause):
            started = time.perf_counter()
            self._sample()
            pause = max(INTERVAL_SECONDS, (time.perf_counter() - started) / SHARE)


def index_of(device: str) -> int:
    return int(device.partition(":")[2])


def cuda_ready() -> bool:
    """Initialise CUDA: peaks can't be reset before. Makes the allocators, but no context."""
    import torch

    if not torch.cuda.is_available():
        return False
    cuda: Any = torch.cuda  # partly untyped
    cuda.init()
    return True


def has_context(index: int) -> bool:
    """Does this process have CUDA's context on that GPU? Asks the driver and makes none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1", mode=os.RTLD_NOLOAD)
    except OSError:
        return False
    device, flags, active = ctypes.c_int(), ctypes.c_uint(), ctypes.c_int()
    if driver.cuDeviceGet(ctypes.byref(device), index):
        return False
    state = driver.cuDevicePrimaryCtxGetState(device, ctypes.byref(flags), ctypes.byref(active))
    return state == 0 and bool(active.value)


def _resident_bytes() -> int | None:
    try:
        psutil: Any = importlib.import_module("psutil")  # accelerate brings it
    except ImportError:
        return None
    return int(psutil.Process().memory_info().rss)


def _shutdown(nvml: Any) -> None:
    with contextlib.suppress(nvml.NVMLError):
        nvml.nvmlShutdown()
