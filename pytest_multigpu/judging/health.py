"""Judging GPU health. Pure: readings in, records out; GPUs that agree share a record.

What NVML does not know is ``unknown``, never passed. Imports records and
:mod:`.throttling`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from ..records.check import Outcome, Record, Value
from ..records.health import GpuHealth
from .throttling import HARDWARE, SW_THERMAL, conditions

_RENT = "rent another machine"
_NOT_MEASURED: Mapping[int, float] = {}


@dataclass(frozen=True, kw_only=True)
class _Finding:
    """One GPU's answer to one question; ``text`` ends a sentence that begins with the GPU."""

    outcome: Outcome
    measured: Value = None
    text: str = ""
    remedy: str = ""


def judge_health(
    rows: Sequence[GpuHealth],
    labels: Mapping[int, str] | None = None,
    *,
    host_gb_per_s: Mapping[int, float] = _NOT_MEASURED,
    too_slow: Collection[int] = (),
) -> list[Record]:
    """ECC, remapped rows, throttling, PCIe, NVLink and MIG of every GPU.

    :param labels: NVML index to ``GPU 2``; by NVML index unless given.
    :param host_gb_per_s: NVML index to what was measured from the host to that GPU.
    :param too_slow: NVML indices of GPUs for which that fails its own check.
    """
    names = labels or {}
    records = [
        Record(
            name="health",
            outcome="failed",
            expected="an answer",
            measured="no answer",
            device=names.get(row.index, f"GPU {row.index}"),
            reason=row.problem,
            remedy="reboot the machine, or rent another",
        )
        for row in rows
        if row.problem is not None
    ]
    asked = [row for row in rows if row.problem is None]

    def pcie(row: GpuHealth) -> _Finding:
        return _pcie(row, host_gb_per_s.get(row.index), failed=row.index in too_slow)

    questions: tuple[tuple[str, Value, Callable[[GpuHealth], _Finding]], ...] = (
        ("ECC errors", "none uncorrected", _ecc),
        ("remapped rows", "none pending, none failed", _remap),
        ("throttling under load", "none", _throttle),
        ("PCIe link under load", "its full width and generation", pcie),
        ("NVLinks", "none down", lambda row: _nvlink(row, asked)),
        ("MIG", "off", _mig),
    )
    for name, expected, judge in questions:
        findings = [(names.get(row.index, f"GPU {row.index}"), judge(row)) for row in asked]
        records.extend(_fold(name, expected, findings))
    return records


def _fold(name: str, expected: Value, findings: Sequence[tuple[str, _Finding]]) -> list[Record]:
    """GPUs with the same answer share a record."""
    groups: dict[_Finding, list[str]] = {}
    for device, finding in findings:
        groups.setdefault(finding, []).append(device)
    return [
        Record(
            name=name,
            outcome=finding.outcome,
            expected=expected,
            measured=finding.measured,
            device=", ".join(devices),
            reason=f"{', '.join(devices)}: {finding.text}" if finding.text else "",
            remedy=finding.remedy,
        )
        for finding, devices in groups.items()
    ]


def _unknown(what: str, command: str) -> _Finding:
    return _Finding(
        outcome="unknown", text=f"the driver does not report {what}", remedy=f"nvidia-smi {command}"
    )


def _ecc(row: GpuHealth) -> _Finding:
    if row.ecc_volatile is None and row.ecc_aggregate is None:
        return _uncounted(row)
    measured = f"{_count(row.ecc_volatile)} since boot, {_count(row.ecc_aggregate)} in all"
    if row.ecc_volatile:
        errors = "error" if row.ecc_volatile == 1 else "errors"
        return _Finding(
            outcome="failed",
            measured=measured,
            text=f"{row.ecc_volatile} uncorrected ECC {errors} since the driver was loaded",
            remedy=f"nvidia-smi --gpu-reset -i {row.index}, or {_RENT}",
        )
    if row.ecc_aggregate:
        return _Finding(
            outcome="warned",
            measured=measured,
            text=f"{row.ecc_aggregate} uncorrected ECC errors in the card's life",
            remedy=f"{_RENT} if any come anew: nvidia-smi -q -d ECC -i {row.index}",
        )
    if row.ecc_volatile is None:
        return _unknown("ECC errors since boot", "-q -d ECC")
    return _Finding(outcome="passed", measured=measured)


def _uncounted(row: GpuHealth) -> _Finding:
    if row.ecc == "none":
        return _Finding(
            outcome="unknown",
            text="this card has no ECC, so that nobody counts its memory's errors",
            remedy="gate such cards without --gpu-strict: README, Consumer cards",
        )
    if row.ecc == "off":
        return _Finding(
            outcome="unknown",
            text="ECC is off, so that nobody counts its memory's errors",
            remedy=f"sudo nvidia-smi -i {row.index} -e 1, then reboot",
        )
    return _unknown("ECC errors", "-q -d ECC")


def _count(number: int | None) -> str:
    return "unknown" if number is None else str(number)


def _remap(row: GpuHealth) -> _Finding:
    if row.remap_failed:
        return _Finding(
            outcome="failed",
            measured="remapping failed",
            text="a faulty memory row could not be remapped",
            remedy=_RENT,
        )
    if row.remap_pending:
        return _Finding(
            outcome="failed",
            measured="remapping pending",
            text="a faulty memory row waits for a reset to be remapped",
            remedy=f"nvidia-smi --gpu-reset -i {row.index}, or {_RENT}",
        )
    if row.remap_failed is None or row.remap_pending is None:
        return _unknown("remapped rows", "-q -d ROW_REMAPPER")
    return _Finding(outcome="passed", measured="none")


def _throttle(row: GpuHealth) -> _Finding:
    if row.throttle is None:
        return _unknown("why its clocks are lowered", "-q -d PERFORMANCE")
    for bit, what in HARDWARE.items():
        if row.throttle & bit:
            return _Finding(
                outcome="failed",
                measured=what,
                text=f"{what}{conditions(row)}",
                remedy=f"check power and cooling, or {_RENT}",
            )
    if row.throttle & SW_THERMAL:
        return _Finding(
            outcome="warned",
            measured="thermal slowdown by the driver",
            text=f"the driver lowers the clocks for heat{conditions(row)}",
            remedy=f"check cooling, or {_RENT}",
        )
    if not row.busy_samples:
        return _Finding(
            outcome="unknown",
            measured="none while idle",
            text="it was idle whenever it was read",
            remedy="run the interconnect check, which loads the GPUs",
        )
    return _Finding(outcome="passed", measured="none")


def throttled(rows: Sequence[GpuHealth], labels: Mapping[int, str]) -> list[str]:
    """``GPU 1 (hardware thermal slowdown)`` for each GPU that ran below its clocks."""
    asked = [row for row in rows if row.problem is None and row.throttle is not None]
    return [
        f"{labels.get(row.index, f'GPU {row.index}')} ({finding.measured})"
        for row in asked
        if (finding := _throttle(row)).outcome in ("failed", "warned")
    ]


def _pcie(row: GpuHealth, gb_per_s: float | None, *, failed: bool) -> _Finding:
    """Fewer lanes or an older generation than the card could have is a warning with its price; it
    fails where the bandwidth from the host, as it was measured, fails too."""
    width, generation = row.pcie_width, row.pcie_generation
    width_max, generation_max = row.pcie_width_max, row.pcie_generation_max
    if width is None or width_max is None or generation is None or generation_max is None:
        return _unknown("its PCIe link", "-q -d PCI")
    measured = f"x{width} of x{width_max}, generation {generation} of {generation_max}"
    if width >= width_max and generation >= generation_max:
        return _Finding(outcome="passed", measured=measured)
    if not row.busy_samples:
        return _Finding(
            outcome="unknown",
            measured=measured,
            text="it was idle whenever it was read, and an idle link may slow down",
            remedy="run the interconnect check, which loads the GPUs",
        )
    # A generation doubles what a lane carries.
    share = min(1.0, width / width_max) * min(1.0, 2.0 ** (generation - generation_max))
    speed = "" if gb_per_s is None else f"{gb_per_s:.1f} GB/s from the host, "
    return _Finding(
        outcome="failed" if failed else "warned",
        measured=measured,
        text=f"PCIe link at {measured}: {speed}at most {share:.0%} of what the card could have",
        remedy=f"reseat the card if its slot has x{width_max}, or {_RENT}"
        if width < width_max
        else _RENT,
    )


def _nvlink(row: GpuHealth, siblings: Sequence[GpuHealth]) -> _Finding:
    """A link that is down while siblings have it up is a fault. No link up at all is a card
    without a bridge, or one that was rented alone: nothing is down that was ever up; beside
    siblings with links it is worth a word, since copies to it go over PCIe."""
    if row.nvlinks_active is None or row.nvlinks_inactive is None:
        return _unknown("NVLink", "nvlink -s")
    active, total = row.nvlinks_active, row.nvlinks_active + row.nvlinks_inactive
    if not total:
        return _Finding(outcome="passed", measured="no NVLink on this card")
    measured = f"{active} of {total} up"
    most = max((s.nvlinks_active or 0) for s in siblings if s.name == row.name)
    if not active and most:
        return _Finding(
            outcome="warned",
            measured=measured,
            text=f"none of {total} NVLinks up; a sibling has {most}: a card without a bridge, "
            "whose copies go over PCIe",
            remedy=f"nvidia-smi nvlink -s -i {row.index}; a bridge between the cards that share a "
            "model, or reset the GPU if it has one",
        )
    if active < most:
        return _Finding(
            outcome="failed",
            measured=measured,
            text=f"{active} of {total} NVLinks up; a sibling has {most}",
            remedy=f"nvidia-smi nvlink -s -i {row.index}; reset the GPU, or {_RENT}",
        )
    if 0 < active < total:
        return _Finding(
            outcome="warned",
            measured=measured,
            text=f"{active} of {total} NVLinks up",
            remedy=f"nvidia-smi nvlink -s -i {row.index}",
        )
    return _Finding(outcome="passed", measured=measured if active else f"not connected ({total})")


def _mig(row: GpuHealth) -> _Finding:
    if row.mig is None:
        return _unknown("MIG", "-q -d MIG")
    if row.mig:
        return _Finding(
            outcome="failed",
            measured="on",
            text="MIG is on, so CUDA sees a part of the card and not the whole",
            remedy=f"sudo nvidia-smi -i {row.index} -mig 0",
        )
    return _Finding(outcome="passed", measured="off")
