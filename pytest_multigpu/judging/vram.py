"""Judging free VRAM and who holds it. Pure.

Imports records, units and :mod:`.machine`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..records.check import Record
from ..records.health import FreeMemory, Holder
from ..records.machine import Machine
from ..units import GIB, gib
from .machine import REBOOT, label

HELD_LIMIT = GIB
"""Memory in use before we start that is worth a word: a bare desktop's stays below."""
HELD_SHARE = 0.25
"""Held memory above this share of a card fails, even where the plan fits around it: whoever holds
that much is at work there, and may take the rest."""
HELD_BY_A_DESKTOP = 4 * GIB
"""Up to here it does not fail by its share: a small card's desktop and browser hold that much."""


def judge_free_memory(
    machine: Machine,
    rows: Sequence[FreeMemory],
    needs: Mapping[int, int],
    *,
    plan_fits: bool,
    fits_if_freed: bool = True,
    waited: float = 0.0,
) -> list[Record]:
    """Is what the plan needs free on each GPU, and does anyone else hold memory.

    A GPU that is too small for its part of the plan is the plan check's to fail; here it fails
    only for memory that somebody holds, and where no plan fits only if it would without them.

    :param needs: NVML index to the plan's peak bytes there.
    :param fits_if_freed: a plan would fit if nobody else held memory.
    :param waited: seconds spent waiting for memory to clear.
    """
    by_index = {gpu.index: gpu for gpu in machine.gpus}
    records = []
    for row in rows:
        if row.gpu in by_index:
            need = needs.get(row.gpu)
            lacks = lacks_memory(row, need, plan_fits=plan_fits, fits_if_freed=fits_if_freed)
            gpu = by_index[row.gpu]
            record = _judge_free(label(gpu), row, need, lacks, waited)
            unread = row.problem is not None and gpu.remedy
            records.append(replace(record, remedy=gpu.remedy) if unread else record)
    return records


def lacks_memory(
    row: FreeMemory, need: int | None, *, plan_fits: bool, fits_if_freed: bool = True
) -> bool:
    """This GPU lacks bytes that somebody else holds, and waiting for them could help."""
    if row.problem is not None or not (plan_fits or fits_if_freed):
        return False
    usable = row.total_bytes - row.reserved_bytes
    if need is not None and need <= usable and row.free_bytes < need:
        return True
    return row.used_bytes > (_most_held(row) if plan_fits else HELD_LIMIT)


def wanted_bytes(row: FreeMemory, need: int | None) -> int:
    """The free bytes that are worth waiting for: the plan's, or all but what may be held."""
    usable = row.total_bytes - row.reserved_bytes
    if need is not None and need <= usable:
        return max(need, usable - _most_held(row))
    return max(0, usable - HELD_LIMIT)


def _most_held(row: FreeMemory) -> int:
    return max(HELD_BY_A_DESKTOP, int(HELD_SHARE * row.total_bytes))


def _judge_free(
    device: str, row: FreeMemory, need: int | None, lacks: bool, waited: float
) -> Record:
    name = "free VRAM"
    if row.problem is not None:
        return Record(
            name=name,
            outcome="failed",
            expected=need,
            unit="bytes",
            device=device,
            reason=row.problem,
            remedy=REBOOT,
        )
    held = row.used_bytes > HELD_LIMIT
    if not lacks and not held:
        return Record(
            name=name,
            outcome="passed",
            expected=need if need is not None and need <= row.free_bytes else None,
            measured=row.free_bytes,
            unit="bytes",
            device=device,
        )
    after = f" after waiting {waited:.0f} s" if waited >= 1 else ""
    who = describe_holders(row.holders)
    # A need that the idle card could not meet is the plan check's to tell.
    if lacks and need is not None and row.free_bytes < need <= row.total_bytes - row.reserved_bytes:
        begin = f"{device} needs {gib(need)} free; found {gib(row.free_bytes)}{after}"
    else:
        begin = f"{device} has {gib(row.free_bytes)} of {gib(row.total_bytes)} free{after}"
    return Record(
        name=name,
        outcome="failed" if lacks else "warned",
        expected=need,
        measured=row.free_bytes,
        unit="bytes",
        device=device,
        reason=f"{begin}: {gib(row.used_bytes)} held by {who}",
        remedy=_free_up(row.holders),
    )


def describe_holders(holders: Sequence[Holder]) -> str:
    """``python (PID 123, alice, 40.0 GiB)``, largest first; or that none is visible."""
    if not holders:
        return "a holder that is not visible from here"
    return ", ".join(_describe(holder) for holder in holders)


def _describe(holder: Holder) -> str:
    details = [f"PID {holder.pid}"]
    if holder.user:
        details.append(holder.user)
    if holder.used_bytes is not None:
        details.append(gib(holder.used_bytes))
    return f"{holder.name or 'a process'} ({', '.join(details)})"


def _free_up(holders: Sequence[Holder]) -> str:
    if not holders:
        return (
            "look outside this container (fuser -v /dev/nvidia*); if nothing shows, "
            "restart the pod or rent another"
        )
    return "kill " + " ".join(str(holder.pid) for holder in holders)
