"""Verdicts about peaks and leftovers. Imports units and records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from ..records.check import Record
from ..records.memory import Growth, Leftover
from ..records.model import PhasePeaks
from ..records.plan import DevicePlan, Plan
from ..units import MIB, gib, human_size
from .distribution import device_label

SHARE: Final = 0.02
SLACK_BYTES: Final = 256 * MIB
"""Predicted and measured may differ by the larger of the two. More is warned about and never
failed: a wrong prediction is a fault of the plan, not of the machine."""
CONTEXT_BYTES: Final = 768 * MIB
"""A CUDA context with torch's kernels at most; 0.5 to 0.7 GiB on an H100."""
KERNEL_BYTES: Final = 256 * MIB
"""Kernels that CUDA loads late into a context that is there already."""


def peak_limit_failures(growths: Sequence[Growth], limit_bytes: int) -> list[str]:
    """One line for each GPU above ``gpu_peak_limit``, or not measured.

    Judged twice: torch's peak of live tensors; and what was live when the test began plus what
    NVML shows more in use since then, which is also what torch does not know of.
    """
    name, lines = "gpu_peak_limit", []
    for one in growths:
        label = device_label(one.device)
        if one.torch_bytes is None or one.grown_bytes is None:
            by = "torch cannot use it" if one.torch_bytes is None else "NVML gave no reading"
            lines.append(_unmeasured(label, by, name, limit_bytes))
            continue
        # A context of its own is none of the test's choosing, and made but once.
        grown = max(0, one.grown_bytes - (0 if one.had_context else CONTEXT_BYTES))
        if one.torch_bytes > limit_bytes:
            shown, limit = _apart(one.torch_bytes, limit_bytes)
            lines.append(f"{label} peaked at {shown}; {name} is {limit}")
        elif one.live_bytes + grown > limit_bytes:
            shown, limit = _apart(one.live_bytes + grown, limit_bytes)
            live = f" and {_size(one.live_bytes)} in tensors before" if one.live_bytes else ""
            lines.append(
                f"{label} peaked at {shown} by NVML, {_size(grown)} more than before the test"
                f"{live}; {name} is {limit}; torch's tensors had {_size(one.torch_bytes)}"
                f"{_whose(one)}"
            )
    return lines


def _whose(one: Growth) -> str:
    if one.hidden_bytes <= SLACK_BYTES:
        return ""
    return ", and NVML shows not whose the rest is: others may have come meanwhile"


def leak_limit_failures(left: Sequence[Leftover], limit_bytes: int) -> list[str]:
    """One line for each GPU on which more than ``gpu_leak_limit`` stayed, or not measured.

    In live tensors; or by NVML, with room for a context and for kernels that CUDA loads when they
    are first used.
    """
    name, lines = "gpu_leak_limit", []
    for one in left:
        label = device_label(one.device)
        used = one.used_left_bytes
        if not one.by_torch or used is None:
            by = "NVML gave no reading" if one.by_torch else "torch cannot use it"
            lines.append(_unmeasured(label, by, name, limit_bytes))
            continue
        room = KERNEL_BYTES + (0 if one.had_context else CONTEXT_BYTES)
        if one.left_bytes > limit_bytes:
            shown, limit = _apart(one.left_bytes, limit_bytes)
            seen = f" (NVML: {human_size(used)} more in use)" if used > 0 else ""
            lines.append(f"{label} was left with {shown} more than before; {name} is {limit}{seen}")
        elif used - room > limit_bytes:
            lines.append(
                f"{label} was left with {_size(used)} more in use by NVML than before, "
                f"{human_size(max(0, one.left_bytes))} of it in torch's tensors; {name} is "
                f"{_size(limit_bytes)}, and {_size(room)} are left to CUDA itself"
            )
    return lines


def _unmeasured(label: str, why: str, name: str, limit_bytes: int) -> str:
    return f"{label} was not measured: {why}; {name} is {_size(limit_bytes)}"


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
        expected=f"at least the weights, {human_size(device.weights_bytes)}",
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


def _apart(value: int, limit: int) -> tuple[str, str]:
    """Both in words that differ: bytes where the rounded ones would be equal."""
    for shown in (_size, human_size):
        if shown(value) != shown(limit):
            return shown(value), shown(limit)
    return f"{value:,} B", f"{limit:,} B"


def _size(value: int) -> str:
    return gib(value) if value >= 1 << 30 else human_size(value)
