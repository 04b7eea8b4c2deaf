"""The markers: what they take, and what their arguments mean. Knows pytest; runs nothing.

Wrong arguments raise :class:`UsageError` naming the test, at collection.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TypeVar, get_args

import pytest

from .concern import fixtures_of
from .errors import UsageError
from .options import TIER_ALIASES
from .records.plan import TIERS, Tier
from .requirements import GpuRequirement, Wanted
from .units import parse_size

Parsed = TypeVar("Parsed")

CHECK_NEEDS = ("plan", "host", "machine", "gpu", "model")
_OF_A_PLAN = frozenset({"gpu_model", "gpu_plan", "gpu_probe"})


def gpu_requirement(item: pytest.Item) -> GpuRequirement | None:
    """The strictest reading of all ``gpu`` marks on a test; None if it has none."""
    found: GpuRequirement | None = None
    for mark in item.iter_markers("gpu"):
        need = _parsed(item, mark, _read_gpu)
        found = need if found is None else _both(found, need)
    return found


def tier_requirement(item: pytest.Item) -> Tier | None:
    """The most demanding tier of all ``gpu_tier`` marks on a test; None if it has none."""
    tiers = [_parsed(item, mark, _read_tier) for mark in item.iter_markers("gpu_tier")]
    return max(tiers, key=TIERS.index) if tiers else None


def size_limit(item: pytest.Item, name: str) -> int | None:
    """Bytes of ``gpu_peak_limit`` or ``gpu_leak_limit``: the mark closest to the test."""
    mark = item.get_closest_marker(name)
    return None if mark is None else _parsed(item, mark, _read_size)


def check_needs(item: pytest.Item) -> str | None:
    """What a shipped check needs, one of ``CHECK_NEEDS``; None for any other test."""
    mark = item.get_closest_marker("check")
    return None if mark is None else _parsed(item, mark, _read_check)


def uses_worker(item: pytest.Item) -> bool:
    """The test asks for what the CUDA worker measures."""
    return not {"gpu_worker", "gpu_health"}.isdisjoint(fixtures_of(item))


def uses_model(item: pytest.Item) -> bool:
    """The test is given a loaded model."""
    return check_needs(item) == "model" or "gpu_model" in fixtures_of(item)


def uses_plan(item: pytest.Item) -> bool:
    """The test rests on a plan: a check, a tier, or a fixture that comes from it."""
    if check_needs(item) is not None or tier_requirement(item) is not None:
        return True
    return not _OF_A_PLAN.isdisjoint(fixtures_of(item))


def wanted(items: Sequence[pytest.Item]) -> Wanted:
    """What these tests want of the session together."""
    needs = dict.fromkeys(map(gpu_requirement, items))
    return Wanted(
        worker=any(map(uses_worker, items)),
        model=any(map(uses_model, items)),
        plan=any(map(uses_plan, items)),
        ours=all(check_needs(item) is not None for item in items),
        needs=tuple(need for need in needs if need is not None),
    )


def validate(item: pytest.Item) -> None:
    """Read every mark of ours on a test, so that a wrong one is found at collection."""
    gpu_requirement(item)
    tier_requirement(item)
    size_limit(item, "gpu_peak_limit")
    size_limit(item, "gpu_leak_limit")
    check_needs(item)
    quick = item.get_closest_marker("quick")
    if quick is not None:
        _parsed(item, quick, _read_quick)


def _parsed(item: pytest.Item, mark: pytest.Mark, read: Callable[[pytest.Mark], Parsed]) -> Parsed:
    try:
        return read(mark)
    except UsageError as error:
        raise UsageError(f"{item.nodeid}: {error}") from None


def _read_gpu(mark: pytest.Mark) -> GpuRequirement:
    known = ("count", "vram", "total_vram", "capability", "nvlink")
    if len(mark.args) > 1 or (mark.args and "count" in mark.kwargs):
        raise UsageError(f"gpu(): takes one positional argument, count; known: {', '.join(known)}")
    for key in mark.kwargs:
        if key not in known:
            raise UsageError(f"gpu({key}=): unknown argument; known: {', '.join(known)}")
    count = mark.args[0] if mark.args else mark.kwargs.get("count", 1)
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise UsageError(f"gpu(count=): {count!r} is not a number of GPUs; write 1 or more")
    nvlink = mark.kwargs.get("nvlink", False)
    if not isinstance(nvlink, bool):
        raise UsageError(f"gpu(nvlink=): {nvlink!r} is neither True nor False")
    return GpuRequirement(
        count=count,
        vram_bytes=_size_argument(mark, "vram"),
        total_vram_bytes=_size_argument(mark, "total_vram"),
        capability=_capability(mark.kwargs.get("capability")),
        nvlink=nvlink,
    )


def _size_argument(mark: pytest.Mark, key: str) -> int | None:
    value = mark.kwargs.get(key)
    if value is None:
        return None
    if not isinstance(value, str):
        raise UsageError(f'gpu({key}=): {value!r} is not a size; write it like "40GiB"')
    return parse_size(value, what=f"gpu({key}=)")


_CAPABILITY = re.compile(r"(\d{1,3})\.(\d{1,3})", re.ASCII)


def _capability(value: object) -> tuple[int, int] | None:
    if value is None:
        return None
    if isinstance(value, tuple) and len(value) == 2 and all(type(part) is int for part in value):
        text = f"{value[0]}.{value[1]}"
    else:
        text = str(value) if isinstance(value, str | float) else ""
    match = _CAPABILITY.fullmatch(text)
    if match is not None:
        return (int(match[1]), int(match[2]))
    raise UsageError(f'gpu(capability=): {value!r} is no compute capability; write it like "8.0"')


def _both(one: GpuRequirement, other: GpuRequirement) -> GpuRequirement:
    def larger(left: int | None, right: int | None) -> int | None:
        return max((value for value in (left, right) if value is not None), default=None)

    capabilities = [value for value in (one.capability, other.capability) if value is not None]
    return GpuRequirement(
        count=max(one.count, other.count),
        vram_bytes=larger(one.vram_bytes, other.vram_bytes),
        total_vram_bytes=larger(one.total_vram_bytes, other.total_vram_bytes),
        capability=max(capabilities, default=None),
        nvlink=one.nvlink or other.nvlink,
    )


def _only_argument(mark: pytest.Mark, example: str) -> object:
    if len(mark.args) != 1 or mark.kwargs:
        raise UsageError(f"{mark.name}(): takes exactly one argument, like {example}")
    return mark.args[0]


def _read_tier(mark: pytest.Mark) -> Tier:
    value = _only_argument(mark, '"8bit"')
    tier = TIER_ALIASES.get(str(value).casefold())
    if tier is None or tier == "cpu":
        names = ", ".join(name for name in get_args(Tier) if name != "cpu")
        raise UsageError(f"gpu_tier(): unknown tier {value!r}; known: {names}")
    return tier


def _read_size(mark: pytest.Mark) -> int:
    value = _only_argument(mark, '"36GiB"')
    if not isinstance(value, str):
        raise UsageError(f'{mark.name}(): {value!r} is not a size; write it like "36GiB"')
    return parse_size(value, what=f"{mark.name}()")


def _read_quick(mark: pytest.Mark) -> None:
    if mark.args or mark.kwargs:
        raise UsageError("quick: takes no argument; write @pytest.mark.quick")


def _read_check(mark: pytest.Mark) -> str:
    value = mark.kwargs.get("needs", mark.args[0] if mark.args else None)
    if value not in CHECK_NEEDS:
        raise UsageError(f"check(needs=): unknown need {value!r}; known: {', '.join(CHECK_NEEDS)}")
    return str(value)
