"""Verdicts about a plan: it fits, nothing spills, every GPU has room, the context has room.

Imports units and records.
"""

from __future__ import annotations

from ..records.check import Record
from ..records.plan import DevicePlan, Plan
from ..units import gib

DEFAULT_REMEDY = "pytest --gpu-plan shows what to rent or change"


def judge_plan(plan: Plan) -> list[Record]:
    """One record for the whole plan, one for offloading, one for each GPU.

    A plan that does not fit is a shortfall, the machine lacks what was asked for; unless another
    placement fits.
    """
    remedy = plan.remedies[0] if plan.remedies else DEFAULT_REMEDY
    what = f"{plan.architecture.model} in {plan.architecture.tier}, {plan.placement} placement"
    records = [
        Record(
            name="plan",
            outcome="passed" if plan.fits else "failed",
            expected=f"{what} fits",
            measured="fits" if plan.fits else "does not fit",
            reason="" if plan.fits else _first(plan.reasons, f"{what} does not fit"),
            remedy="" if plan.fits else remedy,
            shortfall=not plan.fits and not plan.mendable,
        ),
        _offloaded(plan, remedy),
    ]
    records += [_device(device, plan, remedy) for device in plan.devices if _is_gpu(device)]
    records += [
        Record(name="not accounted for", outcome="warned", reason=sentence)
        for sentence in plan.architecture.unknown
    ]
    records += [
        Record(name="better tier", outcome="warned", reason=sentence) for sentence in plan.warnings
    ]
    return records


def judge_context(plan: Plan, largest: int) -> Record:
    """Room for the context asked for: as the plan says, which knows that very context.

    What fits is not one stretch: a context may fit, or not, whatever ``largest`` is.

    :param largest: the longest context found, in tokens per sequence, that fits as placed.
    """
    asked = f"{plan.context_tokens} tokens x {plan.batch}"
    if plan.fits:
        largest, reason = max(largest, plan.context_tokens), ""
    elif largest < plan.context_tokens:
        reason = f"{asked} were asked for and {largest} fit"
    else:
        reason = f"{asked} do not fit: {_first(plan.reasons, 'the plan does not say why')}"
    return Record(
        name="largest context",
        outcome="passed" if plan.fits else "failed",
        expected=plan.context_tokens,
        measured=largest,
        unit="tokens",
        reason=reason,
        remedy="" if plan.fits else _shorter(largest, plan),
        shortfall=not plan.fits and not plan.mendable,
    )


def _shorter(largest: int, plan: Plan) -> str:
    if 0 < largest < plan.context_tokens:
        return f"--gpu-context={largest}"
    return plan.remedies[0] if plan.remedies else DEFAULT_REMEDY


def _offloaded(plan: Plan, remedy: str) -> Record:
    if not plan.device_map:
        return Record(
            name="offloaded blocks",
            outcome="failed",
            expected=0,
            unit="blocks",
            reason=f"nothing is placed: {_first(plan.reasons, 'there is no device map')}",
            remedy=remedy,
            shortfall=True,
        )
    count = len(plan.offloaded)
    listed = ", ".join(plan.offloaded[:4]) + (f" and {count - 4} more" if count > 4 else "")
    return Record(
        name="offloaded blocks",
        outcome="failed" if count else "passed",
        expected=0,
        measured=count,
        unit="blocks",
        reason=f"the plan puts {listed} on cpu or disk" if count else "",
        remedy=remedy if count else "",
        shortfall=bool(count) and not plan.mendable,
    )


def _device(device: DevicePlan, plan: Plan, remedy: str) -> Record:
    name = f"GPU {device.device.removeprefix('cuda:')}"
    over = device.peak_bytes - device.limit_bytes
    return Record(
        name="predicted peak",
        outcome="failed" if over > 0 else "passed",
        expected=device.limit_bytes,
        measured=device.peak_bytes,
        unit="bytes",
        device=name,
        reason=f"{name} lacks {gib(over)} of {gib(device.peak_bytes)}" if over > 0 else "",
        remedy=remedy if over > 0 else "",
        shortfall=over > 0 and not plan.mendable,
    )


def _is_gpu(device: DevicePlan) -> bool:
    return device.device.startswith("cuda:")


def _first(reasons: tuple[str, ...], otherwise: str) -> str:
    return reasons[0] if reasons else otherwise
