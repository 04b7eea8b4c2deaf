"""GPU types: what a card of that name has, and roughly what renting one costs.

``total_bytes`` and ``reserved_bytes`` are NVML's, not the box's: an "80 GB" H100 has 81559 MiB, of
which the driver keeps 480. Those of the H100 80GB HBM3 and the H200 are in reports of real runs
(``results/``); the others' were written down from memory, as the compute capabilities were.
Bandwidths are the data sheets' (:mod:`pytest_multigpu.cards`).

Prices come from no price list: they are the authors' guess, from memory, of on-demand rental per
GPU and hour, good for an order and not for a budget. ``--gpu-catalogue=FILE`` replaces them::

    {"H100": {"price": 2.10}, "MyCard": {"total": 48000000000, "bandwidth": 900, "price": 0.4}}

Imports cards, errors and units.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..cards import MEMORY_GB_PER_S
from ..errors import UsageError, shown
from ..units import MIB

PRICES_GUESSED = "2026-11"
"""When the prices were written down. They were not looked up, then or since."""


@dataclass(frozen=True, kw_only=True)
class GpuType:
    """One row: everything a plan needs to know about a card that isn't there."""

    key: str
    """The name used in ``--gpu-simulate``: ``H100``, ``A100-40GB``."""
    name: str
    """As NVML names it."""
    total_bytes: int
    """NVML's total."""
    bandwidth_gb_s: float
    """Device memory bandwidth by the data sheet, 10**9 bytes a second."""
    reserved_bytes: int = 480 * MIB
    """What the driver keeps for itself on an idle card; in neither free nor used."""
    price_usd_hour: float | None = None
    """On-demand rental of one GPU; None if nothing is known."""
    price_guessed: str | None = None
    """When that was guessed; None: somebody's own price."""
    capability: tuple[int, int] | None = None
    nvlinks: int | None = None
    """NVLinks of each card in machines of several, 0 without NVLink, None if unknown. A bridge
    that may be bought for a card does not count."""
    aliases: tuple[str, ...] = ()

    @property
    def free_bytes(self) -> int:
        """Of an idle card: total less what the driver reserves."""
        return self.total_bytes - self.reserved_bytes


def _row(
    key: str,
    name: str,
    total_mib: int,
    price: float | None,
    capability: tuple[int, int],
    *aliases: str,
    reserved_mib: int = 480,
    nvlinks: int = 0,
) -> GpuType:
    return GpuType(
        key=key,
        name=name,
        total_bytes=total_mib * MIB,
        reserved_bytes=reserved_mib * MIB,
        bandwidth_gb_s=MEMORY_GB_PER_S[name.removeprefix("NVIDIA ")],
        price_usd_hour=price,
        price_guessed=PRICES_GUESSED,
        capability=capability,
        nvlinks=nvlinks,
        aliases=aliases,
    )


CATALOGUE: tuple[GpuType, ...] = (
    _row(
        "B200",
        "NVIDIA B200",
        183359,
        4.50,
        (10, 0),
        "B200-180GB",
        reserved_mib=640,
        nvlinks=18,
    ),
    _row(
        "H200",
        "NVIDIA H200",
        143771,
        3.20,
        (9, 0),
        "H200-141GB",
        reserved_mib=615,
        nvlinks=18,
    ),
    _row(
        "GH200",
        "NVIDIA GH200 480GB",
        97871,
        1.70,
        (9, 0),
        "GH200-96GB",
        reserved_mib=560,
    ),
    _row(
        "H100",
        "NVIDIA H100 80GB HBM3",
        81559,
        2.40,
        (9, 0),
        "H100-80GB",
        "H100-SXM",
        nvlinks=18,
    ),
    _row("H100-PCIE", "NVIDIA H100 PCIe", 81559, 2.10, (9, 0)),
    _row(
        "A100-80GB",
        "NVIDIA A100-SXM4-80GB",
        81920,
        1.40,
        (8, 0),
        "A100",
        "A100-SXM",
        nvlinks=12,
        reserved_mib=610,
    ),
    _row(
        "A100-40GB",
        "NVIDIA A100-SXM4-40GB",
        40960,
        0.95,
        (8, 0),
        nvlinks=12,
        reserved_mib=574,
    ),
    _row(
        "RTXPRO6000",
        "NVIDIA RTX PRO 6000 Blackwell Server Edition",
        97887,
        1.70,
        (12, 0),
        "PRO6000",
        reserved_mib=640,
    ),
    _row("A6000", "NVIDIA RTX A6000", 49140, 0.49, (8, 6), "RTXA6000", reserved_mib=455),
    _row(
        "6000ADA",
        "NVIDIA RTX 6000 Ada Generation",
        49140,
        0.75,
        (8, 9),
        "RTX6000ADA",
        reserved_mib=480,
    ),
    _row("L40S", "NVIDIA L40S", 46068, 0.86, (8, 9), reserved_mib=585),
    _row("A40", "NVIDIA A40", 46068, 0.40, (8, 6), reserved_mib=560),
    _row("V100-32GB", "Tesla V100-SXM2-32GB", 32768, 0.35, (7, 0), "V100", nvlinks=6),
    _row("RTX5090", "NVIDIA GeForce RTX 5090", 32607, 0.70, (12, 0), "5090"),
    _row("RTX4090", "NVIDIA GeForce RTX 4090", 24564, 0.40, (8, 9), "4090"),
    _row("RTX3090", "NVIDIA GeForce RTX 3090", 24576, 0.25, (8, 6), "3090"),
    _row("L4", "NVIDIA L4", 23034, 0.43, (8, 9)),
    _row("A10", "NVIDIA A10", 23028, 0.40, (8, 6), "A10G"),
    _row("T4", "Tesla T4", 15360, 0.20, (7, 5)),
)


def find(name: str, catalogue: tuple[GpuType, ...] = CATALOGUE) -> GpuType | None:
    """The type of that key or alias, without regard to case, spaces and underscores."""
    wanted = _folded(name)
    for row in catalogue:
        if wanted in {_folded(row.key), *map(_folded, row.aliases)}:
            return row
    return None


def _folded(name: str) -> str:
    return name.casefold().replace(" ", "").replace("_", "").replace("-", "")


MOST_BYTES = 1 << 50
LEAST_RATE = 1e-6
"""GB/s or US dollars an hour: below, estimates divided by it would overflow."""
MOST_LINKS = 1000
_FIELDS = ("name", "total", "reserved", "bandwidth", "price", "capability", "nvlink")


def merge_catalogue(
    loaded: object, *, source: str, base: tuple[GpuType, ...] = CATALOGUE
) -> tuple[GpuType, ...]:
    """``base`` with the rows of a catalogue file changed or added.

    :param loaded: what ``json.load`` made of the file: an object of objects. Keys starting with
        ``_comment`` are left alone. ``total`` and ``reserved`` are bytes, ``bandwidth`` GB/s,
        ``price`` US dollars per GPU and hour, ``nvlink`` the number of links or whether there is
        any.
    :param source: the file's name, for errors.
    :raises UsageError: naming the file and the key.
    """
    if not isinstance(loaded, Mapping):
        raise UsageError(
            f"{source}: a catalogue is a JSON object of GPU types; "
            'write {"H100": {"price": 2.4}}'
        )
    rows = {row.key: row for row in base}
    for key, fields in loaded.items():
        if str(key).startswith("_comment"):
            continue
        known = find(str(key), tuple(rows.values()))
        row = _merged(known, str(key), fields, source)
        rows[row.key] = row
    return tuple(rows.values())


def _merged(known: GpuType | None, key: str, fields: object, source: str) -> GpuType:
    if not isinstance(fields, Mapping):
        raise UsageError(f'{source}: {key} is not an object; write {{"price": 2.4}}')
    changes: dict[str, Any] = {}
    for field, value in fields.items():
        if str(field).startswith("_comment"):
            continue
        changes.update(_field(f"{source}: {key}.{field}", str(field), value))
    if known is not None:
        row = replace(known, **changes)
    else:
        for field, name in (("total", "total_bytes"), ("bandwidth", "bandwidth_gb_s")):
            if name not in changes:
                raise UsageError(f"{source}: {key} is a new GPU type and has no {field}; add it")
        row = GpuType(key=key, **{"name": key, **changes})
    if row.reserved_bytes >= row.total_bytes:
        raise UsageError(f"{source}: {key}.reserved is not below its total; give both in bytes")
    return row


def _field(where: str, field: str, value: object) -> dict[str, Any]:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if field in ("total", "reserved"):
        least = 1 if field == "total" else 0
        if type(value) is not int or not least <= value <= MOST_BYTES:
            raise UsageError(f"{where} is {shown(value)}, not a number of bytes; write 85520809984")
        return {f"{field}_bytes": value}
    if field in ("bandwidth", "price"):
        if not number or not LEAST_RATE <= float(str(value)) < 1e6:
            unit = "GB/s" if field == "bandwidth" else "US dollars per hour"
            raise UsageError(f"{where} is {shown(value)}, not a number above 0 in {unit}")
        if field == "bandwidth":
            return {"bandwidth_gb_s": float(str(value))}
        return {"price_usd_hour": float(str(value)), "price_guessed": None}
    if field == "capability":
        pair = isinstance(value, list) and len(value) == 2
        if not pair or not all(type(part) is int for part in value):  # type: ignore[attr-defined]
            raise UsageError(f"{where} is {shown(value)}, not a compute capability; write [9, 0]")
        return {"capability": tuple(value)}  # type: ignore[arg-type]
    if field == "nvlink":
        if not isinstance(value, int) or not 0 <= value <= MOST_LINKS:
            raise UsageError(
                f"{where} is {shown(value)}; write true, false or the number of NVLinks"
            )
        return {"nvlinks": int(value)}
    if field == "name":
        if not isinstance(value, str) or not value:
            raise UsageError(f"{where} is {shown(value)}; write the name that nvidia-smi shows")
        return {"name": value}
    raise UsageError(f"{where} is not a known key; known: {', '.join(_FIELDS)}")
