"""A plan as lines of text: ``--gpu-plan``.

::

    device  layers  weights   KV  activations  reserve  peak  limit
    GPU 0   0-79      131.4  0.6          0.5      0.9  133.4  139.8  GiB, 6.4 GiB left

    the plan fits

Imports records and units.
"""

from __future__ import annotations

from ..records.plan import Architecture, LongestContext, Parts, Plan, auto_call
from ..units import GIB, gib
from .tables import Line, block_list, table_lines
from .words import columns, gib_cell, layers_text, shown_device


def plan_lines(plan: Plan, *, verbosity: int = 0) -> list[Line]:
    """``--gpu-plan``: a row a device, then what does not fit, what is off the GPUs, what to do.

    ``-v`` adds each phase's peak in parts.
    """
    rows = [
        (
            "device",
            "layers",
            "weights",
            "KV",
            "activations",
            "reserve",
            "peak",
            "limit",
            "",
        )
    ]
    markups: list[tuple[str, ...]] = []
    for device in plan.devices:
        on_gpu = device.device.startswith("cuda:")
        if not on_gpu and not device.weights_bytes:
            continue
        lack = device.peak_bytes - device.limit_bytes
        limited = on_gpu
        verdict = "GiB"
        if limited:
            verdict = f"GiB, lacks {gib(lack)}" if lack > 0 else f"GiB, {gib(-lack)} left"
        rows.append(
            (
                shown_device(device.device),
                layers_text(device.layers),
                gib_cell(device.weights_bytes),
                gib_cell(device.kv_bytes),
                gib_cell(device.activation_bytes),
                gib_cell(device.reserve_bytes),
                gib_cell(device.peak_bytes),
                gib_cell(device.limit_bytes) if limited else "-",
                verdict,
            )
        )
        markups.append(("red",) if limited and lack > 0 else () if on_gpu else ("yellow",))
    texts = columns(rows, right=range(2, 8))
    architecture = plan.architecture
    kind = architecture.dtype
    if architecture.attention == "eager":
        kind += ", eager attention"
    lines = [
        Line(
            f"{architecture.model} in {architecture.tier} ({kind}): "
            f"{gib(plan.weights_bytes)} of weights{_unquantised(architecture)}, "
            f"placement {plan.placement}, context {plan.context_tokens} tokens x {plan.batch}"
        ),
        Line(""),
    ]
    if markups:
        lines.append(Line(texts[0], ("bold",)))
        lines += [Line(text, markup) for text, markup in zip(texts[1:], markups, strict=True)]
        lines.append(Line(""))
    if verbosity > 0:
        lines += parts_lines(plan)
        lines += longest_lines(plan)
    if plan.offloaded:
        lines.append(Line(f"off the GPUs: {block_list(plan.offloaded)}", ("red",)))
    lines += [Line(f"not accounted for: {text}", ("yellow",)) for text in architecture.unknown]
    lines += [Line(reason, ("red",)) for reason in plan.reasons]
    lines += [Line(f"remedy: {remedy}") for remedy in plan.remedies]
    lines += [Line(f"warning: {warning}", ("yellow",)) for warning in plan.warnings]
    if plan.fits and plan.max_memory is not None:
        lines.append(Line(f"auto places it like this with {auto_call(plan.max_memory)}"))
    lines.append(_conclusion(plan))
    return lines


def _unquantised(architecture: Architecture) -> str:
    """Where it is more than a router's: the tier saves less than its name says."""
    kept = architecture.unquantised_bytes
    if kept * 20 < architecture.weights_bytes:
        return ""
    return f" ({gib(kept)} of them stay in 16 bit: bitsandbytes takes plain Linears only)"


def _conclusion(plan: Plan) -> Line:
    if not plan.fits:
        return Line("the plan does not fit", ("red", "bold"))
    return Line("the plan fits", ("green", "bold"))


def parts_lines(plan: Plan) -> list[Line]:
    """A row for each GPU and phase: what is in use at the phase's peak, in GiB."""
    rows = [
        (shown_device(device.device), phase, *map(_cell, _sizes(parts)), "GiB")
        for device in plan.devices
        for phase, parts in device.parts.items()
    ]
    if not rows:
        return []
    head = (
        "device", "peak of", "context", "weights", "KV", "activations", "logits", "workspace",
        "transient", "slack", "in all", "",
    )  # fmt: skip
    texts = columns([head, *rows], right=range(2, 11))
    return [Line(texts[0], ("bold",)), *(Line(text) for text in texts[1:]), Line("")]


def longest_lines(plan: Plan) -> list[Line]:
    """A row for each tier: the longest context that fits, in tokens, under each placement, and
    under balanced with expandable segments."""
    columns = ["auto", "balanced"]
    if any(one.expandable_segments for one in plan.longest):
        columns.append("expandable segments")
    tokens = {(one.tier, _column(one)): one.tokens for one in plan.longest}
    tiers = dict.fromkeys(one.tier for one in plan.longest)
    if not tiers:
        return []
    rows = [
        (tier, *(str(tokens[tier, column] or "-") for column in columns), unit)
        for tier in tiers
        for unit in [f"tokens x {plan.batch}"]
    ]
    head = ("longest context", *columns, "")
    right = tuple(range(1, 1 + len(columns)))
    return [*table_lines(head, rows, right=right), Line("")]


def _column(one: LongestContext) -> str:
    return "expandable segments" if one.expandable_segments else one.placement


def _sizes(parts: Parts) -> tuple[int, ...]:
    return (
        parts.context_bytes,
        parts.weights_bytes,
        parts.kv_bytes,
        parts.activations_bytes,
        parts.logits_bytes,
        parts.workspace_bytes,
        parts.transient_bytes,
        parts.slack_bytes,
        parts.total_bytes,
    )


def _cell(size_bytes: int) -> str:
    """Two digits: parts are often small, and they should be seen to sum up."""
    return f"{size_bytes / GIB:.2f}"
