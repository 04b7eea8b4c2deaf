"""The inventory by NVML: no CUDA context, no torch. "No GPU" and "detection broke" differ.

pynvml is imported inside :func:`load_nvml` only; tests replace that one function.
Imports records, errors and its siblings.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from ..errors import MachineError
from ..records.machine import Gpu, Machine
from .cuda_order import cuda_order
from .torch_allocator import expandable_segments
from .visibility import count_device_files, join_by_uuid, read_visibility, with_visible

NvmlLike = Any
"""The pynvml module, or an object with the functions of it that are called here."""

T = TypeVar("T")

NVML_SECONDS = 20.0
"""A driver that has not answered by then hangs: all GPUs of a large machine take under 1 s."""

# Error codes of nvml.h; the names are in the binding, but a fake must not have to carry them.
LIBRARY_NOT_FOUND = 12
FUNCTION_NOT_FOUND = 13
NOT_SUPPORTED = 3
INVALID_ARGUMENT = 2
VERSION_MISMATCH = 18

FATAL = (15, 16)
"""GPU is lost, GPU needs a reset: every other answer would be worthless too."""

_MEMORY_V2 = 0x02000028
_MAX_NVLINKS = 36


class NvmlTimeoutError(Exception):
    """NVML did not answer in time. The text says what it was asked."""


_opened: list[NvmlLike] = []


def load_nvml() -> NvmlLike:
    """The NVML binding, not initialised."""
    import pynvml

    return pynvml


def open_nvml(nvml: NvmlLike | None = None) -> NvmlLike:
    """The binding, initialised.

    It stays open until the process ends: opening costs most, and closing a hung driver would
    keep the process from ending.

    :raises Exception: ``NVMLError`` of the binding, or ImportError without nvidia-ml-py.
    """
    binding = load_nvml() if nvml is None else nvml
    if not any(binding is known for known in _opened):
        binding.nvmlInit()
        _opened.append(binding)
    return binding


def read_machine(
    environ: Mapping[str, str] | None = None,
    nvml: NvmlLike | None = None,
    *,
    seconds: float = NVML_SECONDS,
    ask_cuda: Callable[[Mapping[str, str]], Sequence[str]] = cuda_order,
) -> Machine:
    """The GPUs and what CUDA will see of them. Never raises for what the machine lacks.

    Without the NVIDIA library and without ``/dev/nvidia*`` there is no GPU: ``gpus == ()`` and
    ``problem is None``. Every other failure is a ``problem``. A GPU that cannot be read stays as
    a row with its own ``problem``.

    :param environ: ``os.environ`` unless given.
    :param nvml: the binding; :func:`load_nvml`'s unless given.
    :param seconds: how long the driver may take in all.
    :param ask_cuda: for CUDA's order, where cards are mixed and only it can tell; raises
        MachineError if it does not.
    """
    variables = os.environ if environ is None else environ
    value = variables.get("CUDA_VISIBLE_DEVICES")
    doing = ["starting NVML"]
    try:
        machine = within(seconds, doing, lambda: _read(nvml, doing))
    except NvmlTimeoutError as error:
        return Machine(visible_env=value, problem=str(error))
    except Exception as error:  # no answer that could be read: never "no GPU"
        problem = f"NVML gave an answer that cannot be read: {error!r}"
        return Machine(visible_env=value, problem=problem)
    visibility = read_visibility(value, machine.gpus, variables.get("CUDA_DEVICE_ORDER"))
    machine = replace(
        with_visible(machine, visibility.visible),
        visible_env=value,
        expandable_segments=expandable_segments(variables),
    )
    if visibility.certain_order or not visibility.visible:
        return machine
    try:
        joined = join_by_uuid(machine, ask_cuda(variables))
    except MachineError as error:
        return replace(machine, order_problem=str(error))
    found, expected = len(joined.visible), len(visibility.visible)
    if found != expected:  # which of them is missing, nobody can say: the checks ask CUDA again
        return replace(machine, order_problem=f"lists {found} of {expected} GPUs")
    return joined


def within(seconds: float, doing: list[str], work: Callable[[], T]) -> T:
    """``work()``, given up on after ``seconds``.

    A call into a hung driver cannot be interrupted, so it is left behind in a daemon thread.

    :param doing: its last entry says what was being asked; it goes into the error.
    :raises NvmlTimeoutError: it took longer.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="pytest-multigpu-nvml", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if results:
        return results[0]
    raise NvmlTimeoutError(f"NVML did not answer within {seconds:g} s while {doing[-1]}")


def _read(nvml: NvmlLike | None, doing: list[str]) -> Machine:
    try:
        binding = load_nvml() if nvml is None else nvml
    except ImportError as error:
        return Machine(
            problem=f"nvidia-ml-py cannot be imported ({error}): pip install nvidia-ml-py"
        )
    try:
        open_nvml(binding)
        doing.append("counting the GPUs")
        count = int(binding.nvmlDeviceGetCount())
    except binding.NVMLError as error:
        return _without_gpus(error)
    driver = _try(binding, binding.nvmlSystemGetDriverVersion)
    cuda = _try(binding, binding.nvmlSystemGetCudaDriverVersion)
    if count == 0 and (files := count_device_files()):
        problem = f"NVML lists no GPU although {_files(files)}: a GPU has fallen off the bus"
        return Machine(driver=driver, problem=problem)
    gpus = []
    for index in range(count):
        doing.append(f"reading GPU {index}")
        gpus.append(_read_gpu(binding, index))
    return Machine(gpus=tuple(gpus), driver=_text(driver), cuda=_cuda_version(cuda))


def _without_gpus(error: Exception) -> Machine:
    code = getattr(error, "value", None)
    files = count_device_files()
    if code == LIBRARY_NOT_FOUND:
        if not files:
            return Machine()
        return Machine(
            problem=f"libnvidia-ml.so.1 is missing although {_files(files)}: "
            "start the container with the NVIDIA runtime (docker run --gpus all)"
        )
    if code == VERSION_MISMATCH:
        return Machine(
            problem="the NVIDIA driver and its library have different versions: "
            "reboot the machine, or rent another"
        )
    return Machine(problem=f"NVML cannot start: {error}")


def _files(count: int) -> str:
    return "/dev has 1 NVIDIA GPU" if count == 1 else f"/dev has {count} NVIDIA GPUs"


def _read_gpu(nvml: NvmlLike, index: int) -> Gpu:
    gpu = Gpu(index=index, cuda_index=None, uuid="", name="unknown", total_bytes=0, free_bytes=0)
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        gpu = replace(gpu, name=_text(nvml.nvmlDeviceGetName(handle)) or gpu.name)
        gpu = replace(gpu, uuid=_text(nvml.nvmlDeviceGetUUID(handle)) or "")
        memory = _memory_if_any(nvml, handle)
        links_up, _down = count_nvlinks(nvml, handle)
    except nvml.NVMLError as error:
        return replace(gpu, problem=f"GPU {index} cannot be read: {error}")
    capability = _try(nvml, lambda: nvml.nvmlDeviceGetCudaComputeCapability(handle))
    gpu = replace(
        gpu,
        capability=None if capability is None else (int(capability[0]), int(capability[1])),
        nvlinks=links_up,
    )
    if memory is None:
        return replace(
            gpu,
            problem=f"GPU {index} ({gpu.name}): the driver does not report its memory, as with "
            "GPUs that share the host's",
            remedy="rent a machine whose GPUs have memory of their own: nothing can be planned "
            "without its size",
        )
    total, free, used, reserved = memory
    return replace(
        gpu, total_bytes=total, free_bytes=free, used_bytes=used, reserved_bytes=reserved
    )


def _memory_if_any(nvml: NvmlLike, handle: Any) -> tuple[int, int, int, int] | None:
    """None: this GPU has no memory that NVML could report."""
    try:
        return read_memory(nvml, handle)
    except nvml.NVMLError as error:
        if getattr(error, "value", None) != NOT_SUPPORTED:
            raise
        return None


def read_memory(nvml: NvmlLike, handle: Any) -> tuple[int, int, int, int]:
    """(total, free, used, reserved) bytes of a GPU.

    Drivers before 510 have no v2 structure: there ``used`` includes what the driver reserves,
    and ``reserved`` is 0.

    :raises Exception: ``NVMLError`` of the binding.
    """
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle, version=_MEMORY_V2)
        reserved = int(memory.reserved)
    except nvml.NVMLError as error:
        if getattr(error, "value", None) not in (FUNCTION_NOT_FOUND, NOT_SUPPORTED, 25):
            raise
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        reserved = 0
    return int(memory.total), int(memory.free), int(memory.used), reserved


def count_nvlinks(nvml: NvmlLike, handle: Any) -> tuple[int | None, int | None]:
    """(up, down) NVLinks of a GPU; (0, 0) on a card without NVLink, None where it is unknown.

    :raises Exception: ``NVMLError`` of the binding, if the GPU is lost.
    """
    up = down = 0
    for link in range(_MAX_NVLINKS):
        try:
            state = nvml.nvmlDeviceGetNvLinkState(handle, link)
        except nvml.NVMLError as error:
            code = getattr(error, "value", None)
            if code == INVALID_ARGUMENT or (code == NOT_SUPPORTED and link == 0):
                break  # past the last link, or a card without NVLink
            if code == NOT_SUPPORTED:
                continue
            if code in FATAL:
                raise
            return None, None
        up, down = up + bool(state), down + (not state)
    return up, down


def _try(nvml: NvmlLike, ask: Callable[[], Any]) -> Any:
    """The answer, or None where this GPU or driver has none."""
    try:
        return ask()
    except nvml.NVMLError:
        return None


def _text(value: Any) -> str | None:
    if value is None:
        return None
    return value.decode() if isinstance(value, bytes) else str(value)


def _cuda_version(number: int | None) -> str | None:
    """``13000`` as ``13.0``."""
    return None if number is None else f"{number // 1000}.{number % 1000 // 10}"
