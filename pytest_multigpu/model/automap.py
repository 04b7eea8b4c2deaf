"""What ``device_map="auto"`` will do: the installed transformers' own planner, run beforehand.

The planner's code is called, never imitated: it differs between releases. Only what it would read
from the machine (free bytes of each GPU, available bytes of the host) is given to it, so that a
machine that isn't there can be planned for and CUDA is not initialised.
May import records, errors and its siblings; torch and transformers inside functions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

from ..errors import LoadError
from ..records.automap import AutoMap as AutoMap
from ..records.automap import Planner
from ..records.plan import DeviceMap, MaxMemory, Tier
from . import cache
from .config import ResolvedModel
from .meta import build_meta_model


def auto_device_map(
    resolved: ResolvedModel,
    *,
    tier: Tier,
    free_bytes: Mapping[int, int],
    cpu_bytes: int,
    dtype: str = "bfloat16",
    caps: Mapping[int | str, int] | None = None,
    double_quant: bool = False,
    use_cache: bool = True,
) -> AutoMap:
    """The map of ``from_pretrained(device_map="auto", max_memory=caps)`` on such a machine.

    :param free_bytes: by CUDA index, as ``torch.cuda.mem_get_info`` would give them: after this
        process's own context has been made.
    :param cpu_bytes: available host memory, as psutil gives it.
    :param caps: the user's ``max_memory`` in bytes, by CUDA index or ``cpu``; None if not given.
    :raises UsageError: transformers cannot build the model.
    :raises LoadError: the installed transformers has no planner where this looks for it.
    """

    def compute() -> AutoMap:
        meta = build_meta_model(resolved, tier=tier, dtype=dtype, double_quant=double_quant)
        return _plan(meta.model, meta.quantizer, free_bytes, cpu_bytes, caps)

    if not use_cache:
        return compute()
    return cache.auto_map(
        {
            "config": dict(resolved.config_dict),
            "tier": tier,
            "dtype": dtype,
            "double_quant": double_quant,
            "free_bytes": sorted(free_bytes.items()),
            "cpu_bytes": cpu_bytes,
            "caps": None if caps is None else sorted((str(k), v) for k, v in caps.items()),
        },
        compute,
    )


def search_max_memory(
    resolved: ResolvedModel,
    *,
    tier: Tier,
    dtype: str,
    target: DeviceMap,
    search: Callable[[Planner], MaxMemory | None],
) -> MaxMemory | None:
    """What ``search`` finds by running the planner under one ``max_memory`` after another.

    Such a plan depends on the model alone, not on the machine: ``target`` is in the cache's key.
    None as well where the installed transformers has no planner.

    :raises LoadError: bitsandbytes is needed and cannot be imported.
    """

    def compute() -> MaxMemory | None:
        meta = build_meta_model(resolved, tier=tier, dtype=dtype)

        def planner(caps: MaxMemory) -> DeviceMap:
            return _plan(meta.model, meta.quantizer, {}, 0, caps).device_map

        try:
            return search(planner)
        except LoadError:
            return None

    return cache.max_memory(
        {
            "config": dict(resolved.config_dict),
            "tier": tier,
            "dtype": dtype,
            "target": list(target.items()),
        },
        compute,
    )


def _plan(
    model: Any,
    quantizer: Any,
    free_bytes: Mapping[int, int],
    cpu_bytes: int,
    caps: Mapping[int | str, int] | MaxMemory | None,
) -> AutoMap:
    try:
        from transformers.integrations import accelerate as planner

        get_device_map = planner._get_device_map
    except (ImportError, AttributeError) as error:
        raise _no_planner() from error
    seen: dict[str, Any] = {}
    refusal: str | None = None
    with _machine(planner, free_bytes, cpu_bytes), _observed(quantizer, seen):
        try:
            device_map = get_device_map(
                model, "auto", None if caps is None else dict(caps), quantizer
            )
        except ValueError as error:
            refusal = " ".join(str(error).split())
            device_map = seen.get("device_map") or {}
    plain = {str(name): _plain(device) for name, device in device_map.items()}
    return AutoMap(
        device_map=plain,
        refusal=refusal,
        offloaded=tuple(name for name, device in plain.items() if device in ("cpu", "disk")),
    )


def _no_planner() -> LoadError:
    return LoadError(
        f"transformers {version('transformers')} has no planner in "
        f"transformers.integrations.accelerate; install transformers>=5.10, or give "
        f"--gpu-placement=balanced"
    )


def _plain(device: Any) -> int | str:
    return device if isinstance(device, int) else str(device)


@contextmanager
def _machine(planner: Any, free_bytes: Mapping[int, int], cpu_bytes: int) -> Iterator[None]:
    """While inside, the planner's module (and no other) sees the given machine."""
    if not hasattr(planner, "accelerate_max_memory") or not hasattr(planner, "torch"):
        raise _no_planner()
    installed, real_torch = planner.accelerate_max_memory, planner.torch
    chatter = logging.getLogger("accelerate.utils.modeling")
    level = chatter.level

    def max_memory(given: dict[Any, Any] | None = None) -> Any:
        if given is not None:
            return installed(given)
        return {**{index: free_bytes[index] for index in sorted(free_bytes)}, "cpu": cpu_bytes}

    planner.accelerate_max_memory = max_memory
    # What this process's own allocator holds is none of the plan's business.
    planner.torch = _TorchWithoutCuda(real_torch)
    chatter.setLevel(logging.ERROR)  # it warns about GPUs that are not here
    try:
        yield
    finally:
        planner.accelerate_max_memory, planner.torch = installed, real_torch
        chatter.setLevel(level)


class _TorchWithoutCuda:
    """torch, but for ``torch.cuda.is_available()``."""

    def __init__(self, torch: Any) -> None:
        self._torch = torch
        self.cuda = SimpleNamespace(is_available=lambda: False)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._torch, name)


@contextmanager
def _observed(quantizer: Any, seen: dict[str, Any]) -> Iterator[None]:
    """Keep the map that the quantiser is asked to judge: its refusal does not carry it."""
    if quantizer is None:
        yield
        return
    judge = quantizer.validate_environment

    def observe(*args: Any, **kwargs: Any) -> Any:
        seen.update(kwargs)
        return judge(*args, **kwargs)

    quantizer.validate_environment = observe
    try:
        yield
    finally:
        del quantizer.validate_environment
