"""Verdicts about where a loaded model lies. Imports units and records."""

from __future__ import annotations

from ..records.check import Record
from ..records.model import DevicePlacement, Placement
from ..records.plan import Architecture, Plan
from ..units import human_size


def judge_distribution(
    placement: Placement,
    architecture: Architecture,
    plan: Plan | None,
    *,
    visible: int,
) -> list[Record]:
    """What lies where, nothing off the GPUs, all of it there, and where the plan wanted it.

    :param visible: GPUs that CUDA sees; ignored in the cpu tier, where the host is right.
    """
    on_host = architecture.tier == "cpu"
    records = [_device(device) for device in placement.devices if device.parameters]
    records += [_offloaded(placement, on_host=on_host), _total(placement, architecture)]
    records.append(_as_planned(placement, plan))
    if not on_host:
        records.append(_spread(placement, visible))
    return records


def device_label(device: str) -> str:
    """``cuda:2`` as people read it: ``GPU 2``."""
    kind, _, index = device.partition(":")
    return f"GPU {index}" if kind == "cuda" else device


def _device(device: DevicePlacement) -> Record:
    count = _parameters(device.parameters)
    return Record(
        name="parameters and layers",
        outcome="passed",
        expected="counted",
        measured=f"{count}, {_layers(device.layers)}, {human_size(device.weights_bytes)}",
        device=device_label(device.device),
    )


def _parameters(count: int) -> str:
    """``70.55 B parameters``; small models in full."""
    return f"{count / 1e9:.2f} B parameters" if count >= 10**8 else f"{count:,} parameters"


def _layers(layers: tuple[int, ...]) -> str:
    """``layers 0-19``; gaps are shown: ``layers 0-3, 7``."""
    if not layers:
        return "no layers"
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    text = ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)
    return f"{'layer' if len(layers) == 1 else 'layers'} {text}"


def _offloaded(placement: Placement, *, on_host: bool) -> Record:
    allowed = ("cpu",) if on_host else ("cuda",)
    wrong = [
        f"{block} on {where}"
        for block, place in placement.device_map.items()
        if (where := _device_name(place)).partition(":")[0] not in allowed
    ]
    held = [
        device
        for device in placement.devices
        if device.parameters and device.device.partition(":")[0] not in allowed
    ]
    where = "the CPU" if on_host else "the GPUs"
    if not wrong and not held:
        return Record(
            name="nothing offloaded", outcome="passed", expected=f"all on {where}", measured="all"
        )
    elsewhere = sum(device.parameters for device in held)
    names = ", ".join(wrong[:4]) + (f" and {len(wrong) - 4} more" if len(wrong) > 4 else "")
    return Record(
        name="nothing offloaded",
        outcome="failed",
        expected=f"all on {where}",
        measured=f"{_parameters(elsewhere)} elsewhere",
        reason=f"not on {where}: {names or ', '.join(device.device for device in held)}",
        remedy="free VRAM, take a lower --gpu-tier, or see pytest --gpu-plan for what fits",
        # A spill that the map asked for is no lack of the machine's.
    )


def _total(placement: Placement, architecture: Architecture) -> Record:
    expected, found = architecture.parameters, placement.parameters
    equal = expected == found and found > 0
    return Record(
        name="total parameters",
        outcome="passed" if equal else "failed",
        expected=expected,
        measured=found,
        unit="parameters",
        reason=""
        if equal
        else f"{architecture.model} has {expected:,} parameters, {found:,} were found",
        remedy="" if equal else "the loader left tensors out or doubled them: report this",
    )


def _as_planned(placement: Placement, plan: Plan | None) -> Record:
    name = "placement as planned"
    if plan is None:
        return Record(
            name=name, outcome="unknown", reason="the model was loaded without a plan to compare"
        )
    observed = {block: _device_name(place) for block, place in placement.device_map.items()}
    different = []
    for block, where in observed.items():
        wanted = _planned(block, plan)
        if wanted is not None and wanted != where:
            different.append(f"{block} on {device_label(where)}, planned {device_label(wanted)}")
        elif wanted is None:
            different.append(f"{block} on {device_label(where)}, not in the plan")
    if not observed:
        different.append("no block was found")
    return Record(
        name=name,
        outcome="failed" if different else "passed",
        expected=f"{len(observed)} blocks as planned",
        measured=f"{len(observed) - len(different)} blocks as planned",
        reason="; ".join(different[:3]) + _more(len(different) - 3) if different else "",
        remedy="load with the plan's device_map (--gpu-report=DIR writes it)" if different else "",
    )


def _planned(block: str, plan: Plan) -> str | None:
    """The nearest entry of the plan's map above ``block``."""
    name = block
    while True:
        if name in plan.device_map:
            return _device_name(plan.device_map[name])
        if not name:
            break
        name = name.rpartition(".")[0]
    tied = {entry.name: entry.tied_to for entry in plan.architecture.blocks}.get(block)
    return _planned(tied, plan) if tied else None


def _spread(placement: Placement, visible: int) -> Record:
    used = [d.device for d in placement.devices if d.device.startswith("cuda:") and d.parameters]
    alone = len(used) == 1 and visible > 1
    return Record(
        name="spread over GPUs",
        outcome="warned" if alone else "passed",
        expected=f"up to {visible} GPUs",
        measured=f"{len(used)} GPUs" if len(used) != 1 else "1 GPU",
        reason=f"everything is on {device_label(used[0])}, {visible} GPUs are visible"
        if alone
        else "",
        remedy="use --gpu-placement=balanced, or rent fewer GPUs" if alone else "",
    )


def _device_name(place: int | str) -> str:
    if isinstance(place, int) or place.isdigit():
        return f"cuda:{place}"
    return "cuda:0" if place == "cuda" else place


def _more(count: int) -> str:
    return f"; and {count} more" if count > 0 else ""
