"""Verdicts about peaks and leftovers. Imports units and records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from ..records.check import Record
from ..records.memory import Leftover
from ..records.model import PhasePeaks
from ..records.plan import DevicePlan, Plan
from ..units import MIB, gib, human_size
from .distribution import device_label

SHARE: Final = 0.02
SLACK_BYTES: Final = 256 * MIB
"""Predicted and measured may differ by the larger of the two. More is warned about and never
failed: a wrong prediction is a fault of the plan, not of the machine."""


def peak_limit_failures(peaks: PhasePeaks, limit_bytes: int) -> list[str]:
    """One line for each device above ``gpu_peak_limit``: ``GPU 1 peaked at 37.2 GiB; ...``.

    Judged by torch's allocated bytes, which are this process's own: NVML sees other processes.
    """
    return [
        f"{device_label(reading.device)} peaked at {shown}; gpu_peak_limit is {limit}"
        for reading in peaks.readings
        if reading.allocated_bytes > limit_bytes
        for shown, limit in [_apart(reading.allocated_bytes, limit_bytes)]
    ]


def leak_limit_failures(left: Sequence[Leftover], limit_bytes: int) -> list[str]:
    """One line for each device on which more than ``gpu_leak_limit`` stayed in live tensors."""
    return [
        f"{device_label(one.device)} was left with {shown} more than before; "
        f"gpu_leak_limit is {limit}{_seen(one)}"
        for one in left
        if one.left_bytes > limit_bytes
        for shown, limit in [_apart(one.left_bytes, limit_bytes)]
    ]


def with_load(load: PhasePeaks, phases: Sequence[PhasePeaks]) -> PhasePeaks:
    """The load's peaks as NVML would have shown them: the allocator's reserve at its peak, and what
    the process held outside the allocator in the later phases, the least of those."""
    outside: dict[str, int] = {}
    for phase in phases:
        for reading in phase.readings:
            if reading.used_bytes is not None:
                more = max(0, reading.used_bytes - reading.reserved_bytes)
                outside[reading.device] = min(more, outside.get(reading.device, more))
    return PhasePeaks(
        phase=load.phase,
        readings=tuple(
            reading
            if reading.used_bytes is not None or reading.device not in outside
            else replace(reading, used_bytes=reading.reserved_bytes + outside[reading.device])
            for reading in load.readings
        ),
    )


def judge_peaks(
    phases: Sequence[PhasePeaks], plan: Plan, *, others: Mapping[str, int] | None = None
) -> list[Record]:
    """A record for each phase and planned device: measured beside predicted and limit.

    :param others: bytes that other processes used on each device before this one came.
    """
    records = []
    for phase in phases:
        found = {reading.device: reading for reading in phase.readings}
        for device in plan.devices:
            if device.device == "disk" or not _holds(device, plan):
                continue
            reading = found.get(device.device)
            if phase.phase == "load" and device.device == "cpu":
                continue  # the loader meters GPUs; the host has no limit in the plan
            used = None if reading is None else reading.used_bytes
            if device.device == "cpu":
                records.append(_host(phase.phase, device, used))
            else:
                mine = None if used is None else used - (others or {}).get(device.device, 0)
                records.append(_gpu(phase.phase, device, mine))
    if not records:
        records.append(
            Record(name="peaks", outcome="unknown", reason="no phase of no device was measured")
        )
    return records


def _holds(device: DevicePlan, plan: Plan) -> bool:
    return bool(device.weights_bytes) or (device.device == "cpu" and len(plan.devices) == 1)


def _host(phase: str, device: DevicePlan, used: int | None) -> Record:
    name = f"{phase} peak"
    if used is None:
        return Record(
            name=name, outcome="unknown", device="cpu", reason="no reading of resident memory"
        )
    good = used >= device.weights_bytes
    return Record(
        name=name,
        outcome="passed" if good else "failed",
        expected=device.weights_bytes,
        measured=used,
        unit="bytes",
        device="cpu",
        reason="" if good else "the process held less than the weights: the meter is wrong",
    )


def _gpu(phase: str, device: DevicePlan, used: int | None) -> Record:
    name, label = f"{phase} peak", device_label(device.device)
    predicted: int = getattr(device.peaks, f"{phase}_bytes", 0) or device.peak_bytes
    if used is None:
        return Record(
            name=name,
            outcome="unknown",
            expected=predicted,
            unit="bytes",
            device=label,
            reason="NVML gave no reading of this GPU",
            remedy="nvidia-smi must work as this user",
        )
    limit = device.limit_bytes
    if limit and used > limit:
        shown, most = _apart(used, limit)
        return Record(
            name=name,
            outcome="failed",
            expected=limit,
            measured=used,
            unit="bytes",
            device=label,
            reason=f"{label} peaked at {shown} during {phase}; {most} was free for it",
            remedy="lower --gpu-context or --gpu-batch, or use --gpu-placement=balanced",
        )
    far = abs(used - predicted) > max(SHARE * predicted, SLACK_BYTES)
    direction = "more" if used > predicted else "less"
    return Record(
        name=name,
        outcome="warned" if far else "passed",
        expected=predicted,
        measured=used,
        unit="bytes",
        device=label,
        reason=f"{human_size(abs(used - predicted))} {direction} than the plan predicted"
        if far
        else "",
        remedy="leave that much room, and report it with --gpu-report's folder" if far else "",
    )


def _seen(one: Leftover) -> str:
    if one.used_left_bytes is None:
        return ""
    return f" (NVML: {human_size(one.used_left_bytes)} more in use)"


def _apart(value: int, limit: int) -> tuple[str, str]:
    """Both in words that differ: bytes where the rounded ones would be equal."""
    for shown in (_size, human_size):
        if shown(value) != shown(limit):
            return shown(value), shown(limit)
    return f"{value:,} B", f"{limit:,} B"


def _size(value: int) -> str:
    return gib(value) if value >= 1 << 30 else human_size(value)
