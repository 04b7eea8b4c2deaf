"""Prefill and decode speed beside what memory bandwidth allows and what this software stack should
reach, and what holds it back. Imports records and :mod:`..planning.speed`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from ..planning.device_maps import device_of
from ..planning.speed import step_bytes, step_seconds
from ..records.check import Record
from ..records.generation import GenerationReading, Timing
from ..records.model import Placement
from ..records.plan import Architecture

CPU_BOUND: Final = 0.1
"""Waiting for the GPUs for less than this share of a step: Python is what takes the time."""
SLOWER_THAN_STACK: Final = 1.5
"""Times the expected step: above it something else than this stack holds decoding back."""
TOO_FAST: Final = 1.1
"""Faster than the floor by more than this: the bandwidth or the clock is wrong."""


def memory_seconds(
    placement: Placement,
    bandwidth: Mapping[str, float],
    architecture: Architecture,
    *,
    copies: bool = False,
) -> float | None:
    """Seconds that the memory of the GPUs, one after another, takes for one decode step of one
    sequence: the least, or with ``copies`` what transformers moves (``planning.speed.step_bytes``).

    :param bandwidth: bytes a second of each device's memory, by device name.
    :return: None if a device's bandwidth is not known or a weight is on no GPU.
    """
    moved = step_bytes(architecture, copies=copies)
    # Of each device: what its blocks move beyond their weights; less than nothing if not all.
    beside: dict[str, int] = {}
    for block in architecture.blocks:
        device = f"cuda:{device_of(block.name, placement.device_map)}"
        beside[device] = beside.get(device, 0) + moved[block.name] - block.weights_bytes
    total = 0.0
    for found in placement.devices:
        if not found.weights_bytes:
            continue
        speed = bandwidth.get(found.device)
        if not speed:
            return None
        total += (found.weights_bytes + beside.get(found.device, 0)) / speed
    return total or None


def judge_speed(
    reading: GenerationReading,
    placement: Placement,
    bandwidth: Mapping[str, float],
    architecture: Architecture,
    *,
    throttled: Sequence[str] = (),
    slow_links: Sequence[str] = (),
) -> list[Record]:
    """Prefill, decode, and the decode floor. In the cpu tier there is no floor to hold it to.

    :param throttled: GPUs that run below their clocks, ``GPU 1``.
    :param slow_links: ``GPU 0 -> GPU 1``.
    """
    timing = reading.repeat
    records = [_prefill(reading.prompt_tokens, timing)]
    step = timing.step_seconds
    if not step:
        return [*records, _unknown("decode speed", "no decode step was timed")]
    offloaded = _offloaded(placement)
    cause, remedy, warn = _cause(timing, offloaded, throttled, slow_links)
    records.append(
        Record(
            name="decode speed",
            outcome="warned" if warn else "passed",
            expected="measured",
            measured=round(1 / step, 2),
            unit="tokens/s",
            reason=cause,
            remedy=remedy,
        )
    )
    if any(device.device.startswith("cuda:") for device in placement.devices):
        floor = memory_seconds(placement, bandwidth, architecture)
        records.append(_floor(step, floor, offloaded, cause))
        launch = reading.launch_seconds
        moved = memory_seconds(placement, bandwidth, architecture, copies=True)
        if moved is not None and launch is not None and not offloaded:
            gpus = sum(device.device.startswith("cuda:") for device in placement.devices)
            expected = step_seconds(architecture, moved, gpus=gpus, launch_seconds=launch)
            records.append(_stack(step, expected, launch, cause if warn else ""))
    return records


def _prefill(tokens: int, timing: Timing) -> Record:
    if timing.prefill_seconds <= 0:
        return _unknown("prefill speed", "the prefill was not timed")
    return Record(
        name="prefill speed",
        outcome="passed",
        expected="measured",
        measured=round(tokens / timing.prefill_seconds, 2),
        unit="tokens/s",
    )


def _floor(step: float, floor: float | None, offloaded: bool, cause: str) -> Record:
    name = "decode beside the bandwidth floor"
    if offloaded:
        return _unknown(name, "offloaded weights cross the bus at every token; no floor applies")
    if floor is None:
        return _unknown(name, "the memory bandwidth of a GPU is not known")
    expected = f"at most {1 / floor:.1f} tokens/s by memory bandwidth"
    measured = f"{1 / step:.1f} tokens/s, {floor / step:.0%} of it"
    if floor > TOO_FAST * step:
        return Record(
            name=name,
            outcome="unknown",
            expected=expected,
            measured=measured,
            reason="faster than memory allows: the bandwidth or the clock is wrong",
        )
    return Record(name=name, outcome="passed", expected=expected, measured=measured, reason=cause)


def _stack(step: float, expected: float, launch: float, cause: str) -> Record:
    slow = step > SLOWER_THAN_STACK * expected
    return Record(
        name="decode beside this software stack",
        outcome="warned" if slow else "passed",
        expected=f"about {1 / expected:.1f} tokens/s at {launch * 1e6:.1f} us a kernel launch",
        measured=f"{1 / step:.1f} tokens/s",
        reason=f"a step takes {step / expected:.1f} times what transformers should need here"
        + (f": {cause}" if cause else "")
        if slow
        else "",
        remedy="look for other processes on these CPU cores (top) and GPUs (nvidia-smi)"
        if slow and not cause
        else "",
    )


def _cause(
    timing: Timing, offloaded: bool, throttled: Sequence[str], slow_links: Sequence[str]
) -> tuple[str, str, bool]:
    """Why it is not faster, what to do, and whether that is a defect. The worst cause first."""
    if offloaded:
        return (
            "weights are offloaded and cross the bus at every token",
            "free VRAM or take a lower --gpu-tier",
            True,
        )
    if throttled:
        return f"throttled: {', '.join(throttled)}", "check cooling and the power limit", True
    if slow_links:
        return f"slow link: {', '.join(slow_links)}", "nvidia-smi topo -m shows the links", True
    share = timing.waiting_share
    if timing.waiting_seconds and share is not None and share < CPU_BOUND:
        return f"CPU-bound: the GPUs keep up with Python for {1 - share:.0%} of a step", "", False
    return "", "", False


def _offloaded(placement: Placement) -> bool:
    homes = {d.device.partition(":")[0] for d in placement.devices if d.parameters}
    return ("cuda" in homes and len(homes) > 1) or bool(homes & {"meta", "disk"})


def _unknown(name: str, reason: str) -> Record:
    return Record(name=name, outcome="unknown", reason=reason)
