"""Health by NVML: one reading, or samples while something else loads the cards.

Imports records and :mod:`.nvml`. Creates no CUDA context.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from ..records.health import GpuHealth
from .nvml import (
    FATAL,
    NOT_SUPPORTED,
    NVML_SECONDS,
    NvmlLike,
    NvmlTimeoutError,
    count_nvlinks,
    open_nvml,
    within,
)

IDLE = 0x1
"""nvmlClocksEventReasonGpuIdle."""
_MOST_SAMPLES = 20_000
"""Kept of all GPUs together: a minute of eight."""
_MERGED_AT_ONCE = 1000
"""Merging each sample as it comes would take the interpreter from whoever is importing torch."""

# What changes under load, and how several samples become one: the worst or the highest.
_HIGHEST = (
    "temperature_c",
    "sm_mhz",
    "memory_mhz",
    "pcie_generation",
    "pcie_width",
    "power_w",
)
_MOVING = (*_HIGHEST, "throttle", "samples", "busy_samples")


def read_health(
    nvml: NvmlLike | None = None,
    indices: Sequence[int] | None = None,
    *,
    seconds: float = NVML_SECONDS,
) -> tuple[GpuHealth, ...]:
    """Everything NVML knows about each GPU's health, one reading.

    :param indices: NVML indices; all GPUs unless given.
    :param seconds: how long the driver may take in all.
    :returns: one row a GPU; a GPU that cannot be asked has ``problem``. Empty without a GPU.
    :raises NvmlTimeoutError: the driver hangs.
    :raises Exception: ``NVMLError`` if NVML itself cannot start.
    """
    doing = ["starting NVML"]

    def work() -> tuple[GpuHealth, ...]:
        binding = open_nvml(nvml)
        asked = range(binding.nvmlDeviceGetCount()) if indices is None else indices
        rows = []
        for index in asked:
            doing.append(f"reading the health of GPU {index}")
            rows.append(_read_one(binding, index))
        return tuple(rows)

    return within(seconds, doing, work)


def sample(nvml: NvmlLike, indices: Sequence[int]) -> tuple[GpuHealth, ...]:
    """Only what changes under load; cheap enough to poll. ``nvml`` must be open."""
    return tuple(_guarded(nvml, index, _moving) for index in indices)


def merge(readings: Sequence[GpuHealth]) -> GpuHealth:
    """Several readings of one GPU as one: throttle reasons joined, the rest the highest.

    What only the first reading has (ECC, NVLink, ...) is kept; ``problem`` is the first seen.

    :raises ValueError: none, or of different GPUs.
    """
    if not readings or len({reading.index for reading in readings}) != 1:
        raise ValueError("readings of exactly one GPU are needed")
    first = readings[0]
    changed: dict[str, Any] = {}
    for field in fields(GpuHealth):
        values = [getattr(reading, field.name) for reading in readings]
        known = [value for value in values if value is not None]
        if field.name in ("samples", "busy_samples"):
            changed[field.name] = sum(known)
        elif field.name == "throttle":
            changed[field.name] = _joined(known)
        elif field.name in _HIGHEST:
            changed[field.name] = max(known) if known else None
        elif field.name != "index":
            changed[field.name] = next((v for v in known if v != ""), getattr(first, field.name))
    return replace(first, **changed)


def _joined(masks: Sequence[int]) -> int | None:
    if not masks:
        return None
    joined = 0
    for mask in masks:
        joined |= mask
    return joined


class Sampler:
    """Samples health in a thread while the GPUs work.

    ::

        with Sampler(indices=[0, 1]) as sampler:
            ...                     # the worker loads the cards
        rows = sampler.result()     # one GpuHealth a GPU, all samples merged
        rows = sampler.between(began, ended)    # the same of some seconds alone

    What goes wrong in the thread is in the rows' ``problem``; nothing is raised at the caller.
    """

    def __init__(
        self,
        indices: Sequence[int],
        nvml: NvmlLike | None = None,
        *,
        interval: float = 0.02,
    ) -> None:
        """:param interval: seconds between two samples."""
        self._indices = tuple(indices)
        self._nvml = nvml
        self._interval = interval
        self._merged: dict[int, GpuHealth] = {}
        self._unmerged: list[GpuHealth] = []
        self._seen: deque[tuple[float, GpuHealth]] = deque(maxlen=_MOST_SAMPLES)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._problem: str | None = None
        self._lock = threading.Lock()

    def start(self) -> None:
        """Begin sampling; does nothing if it has begun."""
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._run, name="pytest-multigpu-health", daemon=True
            )
            self._thread.start()

    def stop(self, seconds: float = 5.0) -> None:
        """End sampling. A thread caught in a hung driver is left behind."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(seconds)
            if self._thread.is_alive():
                self._problem = f"NVML did not answer within {seconds:g} s while sampling health"

    def __enter__(self) -> Sampler:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def result(self) -> tuple[GpuHealth, ...]:
        """What was seen so far, one row a GPU in the order asked for."""
        with self._lock:
            self._merge()
            rows = [
                self._merged.get(index, GpuHealth(index=index, samples=0, problem="never sampled"))
                for index in self._indices
            ]
        if self._problem is None:
            return tuple(rows)
        return tuple(
            replace(row, problem=row.problem if row.samples and row.problem else self._problem)
            for row in rows
        )

    def between(self, began: float, ended: float) -> tuple[GpuHealth, ...]:
        """The same, but what changes under load as seen in that time: one row a GPU seen then.

        :param began: seconds since the epoch, as ``ended``.
        """
        with self._lock:
            self._merge()
            seen = [row for when, row in self._seen if began <= when <= ended]
            whole = dict(self._merged)
        found = []
        for index in self._indices:
            if rows := [row for row in seen if row.index == index]:
                then = merge(rows)
                changes = {name: getattr(then, name) for name in (*_MOVING, "problem")}
                found.append(replace(whole[index], **changes))
        return tuple(found)

    def _run(self) -> None:
        try:
            nvml = open_nvml(self._nvml)
            for index in self._indices:  # once, with what does not change under load
                self._add(_read_one(nvml, index))
            while not self._stop.is_set():
                for row in sample(nvml, self._indices):
                    self._add(row)
                self._stop.wait(self._interval)
        except Exception as error:  # shown in every row, so that nothing counts as healthy
            self._problem = f"health could not be sampled: {error}"

    def _add(self, row: GpuHealth) -> None:
        with self._lock:
            self._seen.append((time.time(), row))
            self._unmerged.append(row)
            if len(self._unmerged) >= _MERGED_AT_ONCE:
                self._merge()

    def _merge(self) -> None:
        for index in {row.index for row in self._unmerged}:
            rows = [row for row in self._unmerged if row.index == index]
            known = self._merged.get(index)
            self._merged[index] = merge(rows if known is None else [known, *rows])
        self._unmerged.clear()


def _read_one(nvml: NvmlLike, index: int) -> GpuHealth:
    return _guarded(nvml, index, lambda *ask: merge([_moving(*ask), _still(*ask)]))


def _guarded(nvml: NvmlLike, index: int, read: Callable[[_Ask, int], GpuHealth]) -> GpuHealth:
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        return read(_Ask(nvml, handle), index)
    except nvml.NVMLError as error:
        return GpuHealth(index=index, problem=f"GPU {index} cannot be read: {error}")


@dataclass(frozen=True)
class _Ask:
    """One GPU's questions. "Not supported" and the like are None; a lost GPU is raised."""

    nvml: NvmlLike
    handle: Any

    def __call__(self, function: str, *arguments: Any) -> Any:
        try:
            return getattr(self.nvml, function)(self.handle, *arguments)
        except AttributeError:
            return None  # an older binding
        except self.nvml.NVMLError as error:
            if error.value in FATAL:
                raise
            return None


def _moving(ask: _Ask, index: int) -> GpuHealth:
    throttle = ask("nvmlDeviceGetCurrentClocksEventReasons")
    if throttle is None:  # drivers before 535 have only the old name
        throttle = ask("nvmlDeviceGetCurrentClocksThrottleReasons")
    power = ask("nvmlDeviceGetPowerUsage")
    busy = throttle is not None and not throttle & IDLE
    return GpuHealth(
        index=index,
        throttle=throttle,
        temperature_c=ask("nvmlDeviceGetTemperature", 0),
        sm_mhz=ask("nvmlDeviceGetClockInfo", 1),
        memory_mhz=ask("nvmlDeviceGetClockInfo", 2),
        pcie_generation=ask("nvmlDeviceGetCurrPcieLinkGeneration"),
        pcie_width=ask("nvmlDeviceGetCurrPcieLinkWidth"),
        power_w=None if power is None else power / 1000,
        busy_samples=int(busy),
    )


def _still(ask: _Ask, index: int) -> GpuHealth:
    remapped = ask("nvmlDeviceGetRemappedRows")
    limit = ask("nvmlDeviceGetEnforcedPowerLimit")
    active, inactive = count_nvlinks(ask.nvml, ask.handle)
    return GpuHealth(
        index=index,
        name=_text(ask("nvmlDeviceGetName")),
        ecc=_ecc(ask),
        ecc_volatile=ask("nvmlDeviceGetTotalEccErrors", 1, 0),
        ecc_aggregate=ask("nvmlDeviceGetTotalEccErrors", 1, 1),
        remap_pending=None if remapped is None else bool(remapped[2]),
        remap_failed=None if remapped is None else bool(remapped[3]),
        slowdown_c=ask("nvmlDeviceGetTemperatureThreshold", 1),
        sm_max_mhz=ask("nvmlDeviceGetMaxClockInfo", 1),
        memory_max_mhz=ask("nvmlDeviceGetMaxClockInfo", 2),
        pcie_generation_max=ask("nvmlDeviceGetMaxPcieLinkGeneration"),
        pcie_width_max=ask("nvmlDeviceGetMaxPcieLinkWidth"),
        nvlinks_active=active,
        nvlinks_inactive=inactive,
        mig=_mig(ask),
        power_limit_w=None if limit is None else limit / 1000,
        samples=0,
    )


def _ecc(ask: _Ask) -> Literal["on", "off", "none"] | None:
    """ "Not supported" is a card without ECC, as most that are sold for games."""
    try:
        current, _pending = ask.nvml.nvmlDeviceGetEccMode(ask.handle)
    except ask.nvml.NVMLError as error:
        if error.value in FATAL:
            raise
        return "none" if error.value == NOT_SUPPORTED else None
    return "on" if current else "off"


def _mig(ask: _Ask) -> bool | None:
    """Whether MIG is enabled; "not supported" is a definite no."""
    try:
        current, _pending = ask.nvml.nvmlDeviceGetMigMode(ask.handle)
    except ask.nvml.NVMLError as error:
        if error.value in FATAL:
            raise
        return False if error.value == NOT_SUPPORTED else None
    return bool(current)


def _text(value: Any) -> str:
    if value is None:
        return ""
    return value.decode() if isinstance(value, bytes) else str(value)


__all__ = ["IDLE", "NvmlTimeoutError", "Sampler", "merge", "read_health", "sample"]
