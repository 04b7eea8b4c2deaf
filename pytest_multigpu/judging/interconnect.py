"""Judges copies: host to GPU, every ordered pair, chains, and how fast the pairs are.

Pure: records in, records out. Limits are in ``thresholds``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from statistics import median

from ..records.check import Record
from ..records.worker import ChainCopy, Difference, PairCopy, WorkerReport
from .thresholds import LEAST_PAIR_GB_PER_S, SLOW_PAIR_SIBLING
from .worker import gpu_path, not_measured

COPY_REMEDY = (
    "rent another machine; on bare metal turn off PCIe ACS and boot with iommu=pt or iommu=off "
    "(NCCL_P2P_DISABLE=1 does not change .to()); until then use one GPU, or send tensors "
    "through the host: tensor.cpu().to(device)"
)
UPLOAD_REMEDY = "rent another machine: host memory, PCIe or the GPU's memory changes bytes"
LINK_REMEDY = "look at `nvidia-smi nvlink -s` and `nvidia-smi topo -m`, or rent another machine"


def difference(differing_bytes: int, total: int, kind: Difference, first: int | None) -> str:
    """``12,345 of 67,108,864 bytes differ (all zero) from offset 0``."""
    return f"{differing_bytes:,} of {total:,} bytes differ ({kind}) from offset {first}"


def uploads(report: WorkerReport) -> list[Record]:
    """Bytes that came from the host; every later comparison rests on them."""
    name = "copies from the host"
    records = [
        Record(
            name=name,
            outcome="passed" if upload.equal else "failed",
            expected="equal bytes",
            measured="equal bytes" if upload.equal else "other bytes",
            device=f"GPU {upload.gpu}",
            reason=""
            if upload.equal
            else f"{upload.bytes:,} bytes from the host arrived changed on GPU {upload.gpu}",
            remedy="" if upload.equal else UPLOAD_REMEDY,
        )
        for upload in report.uploads
    ]
    if len(records) < len(report.devices) or not records:
        records += not_measured(report, name, "equal bytes", "devices", "uploads")
    return records


def copies(report: WorkerReport) -> list[Record]:
    """One record for each ordered pair; one in all on a machine with a single GPU."""
    name = "copies between GPUs"
    single = _single(report, name)
    if single:
        return single
    count = len(report.devices)
    records = [_pair(name, pair) for pair in report.pairs]
    missing = count * (count - 1) - len(records)
    if missing or not records or report.failed_step == "copies":
        records += not_measured(report, name, "equal bytes", "devices", "copies")
    return records


def chains(report: WorkerReport) -> list[Record]:
    """One record for each order, with and without a kernel before each hop."""
    name = "chained copies"
    single = _single(report, name)
    if single:
        return single
    records = [_chain(name, chain) for chain in report.chains]
    step = report.step("chains")
    stopped = report.failed_step == "chains"
    missing = step is None or step.seconds is None or not records
    if stopped or missing or _left_out(report):
        records += not_measured(report, name, "equal bytes", "devices", "chains")
    return records


def pair_bandwidths(report: WorkerReport) -> list[Record]:
    """Each pair against the pairs with the same link, and against a floor."""
    name = "copy bandwidth"
    single = _single(report, name)
    if single:
        return single
    groups: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for pair in report.pairs:
        if pair.gb_per_s is not None:
            groups[pair.link, pair.topology].append(pair.gb_per_s)
    records = [
        _bandwidth(name, pair, pair.gb_per_s, median(groups[pair.link, pair.topology]))
        for pair in report.pairs
        if pair.gb_per_s is not None
    ]
    count = len(report.devices)
    if len(records) < count * (count - 1) or not records:
        records += not_measured(report, name, "a speed for every pair", "devices", "pair speed")
    return records


def slow_hops(report: WorkerReport, path: Sequence[int]) -> list[str]:
    """``GPU 0 -> GPU 1`` for each hop of ``path`` whose bandwidth fails its check.

    :param path: CUDA indices in the order in which activations visit them.
    """
    slow = {record.device for record in pair_bandwidths(report) if record.outcome == "failed"}
    return [hop for pair in pairwise(path) if (hop := gpu_path(pair)) in slow]


def _left_out(report: WorkerReport) -> bool:
    """A GPU had no room for the copies: the chains went around it."""
    return any(entry.step == "devices" for entry in report.unmeasured)


def _single(report: WorkerReport, name: str) -> list[Record]:
    """On one GPU nothing is copied; the record says so rather than claim a copy."""
    if len(report.devices) != 1 or report.failure is not None:
        return []
    return [Record(name=name, outcome="passed", expected="nothing to copy", measured="1 GPU")]


def _pair(name: str, pair: PairCopy) -> Record:
    device = gpu_path((pair.source, pair.target))
    if not pair.differing_bytes:
        return Record(
            name=name,
            outcome="passed",
            expected="equal bytes",
            measured=f"{pair.bytes:,} equal bytes",
            device=device,
        )
    what = difference(pair.differing_bytes, pair.bytes, pair.kind, pair.first_offset)
    return Record(
        name=name,
        outcome="failed",
        expected="equal bytes",
        measured=f"{pair.differing_bytes:,} differing bytes",
        device=device,
        reason=f"{what}: a tensor moved this way is silently wrong",
        remedy=COPY_REMEDY,
    )


def _chain(name: str, chain: ChainCopy) -> Record:
    device = gpu_path(chain.order)
    if chain.after_kernel:
        name = f"{name} behind kernels"
    if not chain.differing_bytes:
        return Record(
            name=name,
            outcome="passed",
            expected="equal bytes",
            measured=f"{chain.bytes:,} equal bytes",
            device=device,
        )
    what = difference(chain.differing_bytes, chain.bytes, chain.kind, chain.first_offset)
    where = f", first wrong after {gpu_path(chain.wrong_hop)}" if chain.wrong_hop else ""
    return Record(
        name=name,
        outcome="failed",
        expected="equal bytes",
        measured=f"{chain.differing_bytes:,} differing bytes",
        device=device,
        reason=f"{what}{where}",
        remedy=COPY_REMEDY,
    )


def _bandwidth(name: str, pair: PairCopy, speed: float, typical: float) -> Record:
    limit = max(SLOW_PAIR_SIBLING * typical, LEAST_PAIR_GB_PER_S)
    way = {"CPU": "through the CPU", "unknown": "link unknown"}.get(pair.link, pair.link)
    slow = speed < limit
    device = gpu_path((pair.source, pair.target))
    reason = ""
    if slow and limit > LEAST_PAIR_GB_PER_S:
        reason = f"{device} copies {speed:.1f} GB/s, pairs with the same link {typical:.1f} GB/s"
    elif slow:
        reason = f"{device} copies {speed:.1f} GB/s, slower than any sound link"
    return Record(
        name=f"{name} ({way}{', ' + pair.topology if pair.topology else ''})",
        outcome="failed" if slow else "passed",
        expected=f"at least {limit:.1f}",
        measured=round(speed, 1),
        unit="GB/s",
        device=device,
        reason=reason,
        remedy=LINK_REMEDY if slow else "",
    )
