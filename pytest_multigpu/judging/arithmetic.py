"""Judges what each GPU computes and how fast, against its siblings and its datasheet.

Pure: records in, records out. Limits are in ``thresholds``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import median

from ..cards import memory_gb_per_s
from ..records.check import Record
from ..records.worker import Product, WorkerReport
from .thresholds import (
    LEAST_HOST_GB_PER_S,
    LEAST_OF_DATASHEET,
    RELATIVE_ERROR,
    SLOW_HOST_SIBLING,
    SLOW_SIBLING,
)
from .throttling import Readings, how_it_is_linked, how_it_ran
from .worker import not_measured

ARITHMETIC_REMEDY = "rent another machine: this GPU computes wrong numbers"
SPEED_STEPS = ("load", "memory speed", "host speed")
"""The worker's steps in which speeds are measured, one right after the other."""
_UNREAD: Readings = {}
SLOW_REMEDY = (
    "look at clocks and throttle reasons with `nvidia-smi -q -d PERFORMANCE,CLOCK -i N` under "
    "load, or rent another machine"
)
HOST_REMEDY = (
    "look at the PCIe width and generation under load with `nvidia-smi -q -i N`, "
    "or rent another machine"
)


def products(report: WorkerReport) -> list[Record]:
    """Each GPU's bf16 and fp32 product against the CPU's and, bit for bit, its siblings'."""
    records = []
    for dtype in RELATIVE_ERROR:
        found = {product.gpu: product for product in report.products if product.dtype == dtype}
        missing = len(found) < len(report.devices) or not report.devices
        records += [_product(report, product, found) for product in found.values()]
        if missing:
            records += not_measured(
                report, f"{dtype} product", "equal on all GPUs", "devices", "arithmetic"
            )
    return records


def _product(report: WorkerReport, product: Product, found: Mapping[int, Product]) -> Record:
    name = f"{product.dtype} product"
    tolerance = RELATIVE_ERROR[product.dtype]
    device = f"GPU {product.gpu}"
    expected = f"the siblings' bits and within {tolerance:g} of float64"
    if not product.relative_error <= tolerance:
        return Record(
            name=name,
            outcome="failed",
            expected=expected,
            measured=f"{product.relative_error:.3g} off",
            device=device,
            reason=f"{device} is {product.relative_error:.3g} off the CPU's float64 product, "
            f"more than {tolerance:g}",
            remedy=ARITHMETIC_REMEDY,
        )
    siblings = [found[gpu] for gpu in siblings_of(report, product.gpu) if gpu in found]
    others = [other for other in siblings if other.checksum != product.checksum]
    sound = [other for other in others if other.relative_error <= tolerance]
    votes = Counter(other.checksum for other in siblings)
    if sound and votes[product.checksum] <= max(votes[other.checksum] for other in sound):
        names = ", ".join(f"GPU {other.gpu}" for other in others)
        return Record(
            name=name,
            outcome="failed",
            expected=expected,
            measured="other bits",
            device=device,
            reason=f"{device} has other bits than {names} of the same model",
            remedy=ARITHMETIC_REMEDY,
        )
    return Record(
        name=name,
        outcome="passed",
        expected=expected,
        measured=f"{product.relative_error:.2g} off float64",
        device=device,
    )


def siblings_of(report: WorkerReport, gpu: int) -> list[int]:
    """CUDA indices of the GPUs of the same model, this one included."""
    by_index = {device.index: device for device in report.devices}
    own = by_index.get(gpu)
    if own is None:
        return [gpu]
    return [
        device.index
        for device in report.devices
        if (device.name, device.capability) == (own.name, own.capability)
    ]


def memory_bandwidths(report: WorkerReport, readings: Readings = _UNREAD) -> list[Record]:
    """Copy within each GPU, against siblings and datasheet.

    :param readings: read while the speeds were measured, as for the others here.
    """
    name = "memory bandwidth"
    found = {
        speed.gpu: speed.memory_gb_per_s
        for speed in report.speeds
        if speed.memory_gb_per_s is not None
    }
    names = {device.index: device.name for device in report.devices}
    records = []
    for gpu in found:
        known = memory_gb_per_s(names.get(gpu, ""))
        floor = LEAST_OF_DATASHEET * known if known is not None else 0.0
        what = f"the {known:g} GB/s of its datasheet" if known is not None else ""
        records.append(
            _speed(
                report,
                name,
                gpu,
                found,
                unit="GB/s",
                share=SLOW_SIBLING,
                floor=floor,
                floor_name=what,
                remedy=SLOW_REMEDY,
                readings=readings,
            )
        )
    return records + _rest(report, name, found, "memory speed")


def product_speeds(report: WorkerReport, readings: Readings = _UNREAD) -> list[Record]:
    """bf16 products under load, all GPUs at once, against siblings."""
    name = "bf16 speed under load"
    found = {
        speed.gpu: speed.tflop_per_s for speed in report.speeds if speed.tflop_per_s is not None
    }
    records = [
        _speed(
            report,
            name,
            gpu,
            found,
            unit="TFLOP/s",
            share=SLOW_SIBLING,
            remedy=SLOW_REMEDY,
            readings=readings,
        )
        for gpu in found
    ]
    return records + _rest(report, name, found, "load")


def host_bandwidths(report: WorkerReport, readings: Readings = _UNREAD) -> list[Record]:
    """Pinned host memory to each GPU, against siblings and a floor."""
    name = "host to GPU bandwidth"
    found = {
        upload.gpu: upload.gb_per_s for upload in report.uploads if upload.gb_per_s is not None
    }
    records = [
        _speed(
            report,
            name,
            gpu,
            found,
            unit="GB/s",
            share=SLOW_HOST_SIBLING,
            floor=LEAST_HOST_GB_PER_S,
            floor_name="any sound PCIe link",
            remedy=HOST_REMEDY,
            readings=readings,
            why=how_it_is_linked,
        )
        for gpu in found
    ]
    return records + _rest(report, name, found, "host speed")


def slow_from_host(report: WorkerReport) -> list[int]:
    """CUDA indices of the GPUs whose bandwidth from the host fails."""
    failed = {one.device for one in host_bandwidths(report) if one.outcome == "failed"}
    return [upload.gpu for upload in report.uploads if f"GPU {upload.gpu}" in failed]


def _rest(report: WorkerReport, name: str, found: Mapping[int, float], step: str) -> list[Record]:
    if report.devices and len(found) == len(report.devices):
        return []
    return not_measured(report, name, "a speed for every GPU", "devices", step)


def _speed(
    report: WorkerReport,
    name: str,
    gpu: int,
    found: Mapping[int, float],
    *,
    unit: str,
    share: float,
    remedy: str,
    readings: Readings,
    why: Callable[[int, Sequence[int], Readings], str] = how_it_ran,
    floor: float = 0.0,
    floor_name: str = "",
) -> Record:
    """``floor`` in ``unit`` and what it is a share of; 0 for none.

    :param why: says of a slow GPU how NVML saw it beside its siblings.
    """
    speed = found[gpu]
    siblings = [other for other in siblings_of(report, gpu) if other in found and other != gpu]
    typical = median(found[other] for other in siblings) if siblings else 0.0
    limit = max(share * typical, floor)
    reason = ""
    if typical and speed < share * typical:
        reason = (
            f"GPU {gpu} reaches {speed:.1f} {unit}, its siblings {typical:.1f} {unit}: "
            f"below {share:.0%} of them"
        )
    elif speed < floor:
        reason = f"GPU {gpu} reaches {speed:.1f} {unit}, too little for {floor_name}"
    if reason:
        reason += f"; {why(gpu, siblings, readings)}"
    return Record(
        name=name,
        outcome="failed" if reason else "passed",
        expected=f"at least {limit:.1f}" if limit else "nothing to compare with",
        measured=round(speed, 1),
        unit=unit,
        device=f"GPU {gpu}",
        reason=reason,
        remedy=remedy.replace("-i N", f"-i {gpu}") if reason else "",
    )
