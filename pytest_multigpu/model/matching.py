"""Which tensor of a checkpoint fills which tensor of a model, on which device, in which dtype.

The rules are transformers' own (``convert_and_load_state_dict_in_model``), read from the model
and from the options of the load. May import errors and siblings; torch and transformers in
functions.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

from ..errors import CheckpointError
from .safetensors_index import TORCH_DTYPE, StoredTensor


@dataclasses.dataclass
class Target:
    """A tensor of the model that has to be filled."""

    name: str
    shape: tuple[int, ...]
    dtype: Any
    """What it has before quantisation."""
    device: Any
    quantised: bool

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * int(self.dtype.itemsize)


def targets_of(model: Any, load_config: Any) -> list[Target]:
    """Every tensor of the model's state dict that is not tied to another, in no special order."""
    import torch
    from transformers.integrations.accelerate import expand_device_map

    quantizer = load_config.hf_quantizer
    state = model.state_dict()
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    places = expand_device_map(load_config.device_map, list(state))
    plan = _dtype_plan(load_config)
    found = []
    for name, tensor in state.items():
        if name in tied or not isinstance(tensor, torch.Tensor):
            continue
        quantised = bool(quantizer is not None and quantizer.param_needs_quantization(model, name))
        dtype = load_config.dtype if quantised else plan(name) or tensor.dtype
        found.append(
            Target(name, tuple(tensor.shape), dtype, _device(places[name]), quantised=quantised)
        )
    return found


def _dtype_plan(load_config: Any) -> Callable[[str], Any]:
    """What transformers keeps in another dtype than the model's (``_keep_in_fp32_modules``)."""
    plan = load_config.dtype_plan or {}
    if not plan:
        return lambda _: None
    from transformers.core_model_loading import build_glob_alternation

    alternation, by_group, _ = build_glob_alternation(list(plan))

    def dtype_of(name: str) -> Any:
        match = alternation.search(name)
        return plan[by_group[match.lastgroup]] if match is not None else None

    return dtype_of


def _device(place: Any) -> Any:
    import torch

    if place == "disk":
        return torch.device("cpu")
    device = torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def match(
    model: Any, headers: Mapping[str, StoredTensor], load_config: Any, source: str
) -> tuple[str | None, list[tuple[str, Target]]]:
    """Checkpoint keys and what they fill, in the order in which transformers asks for them.

    The first of the pair is the reason why this checkpoint is left to transformers, or None.

    :raises CheckpointError: tensors are missing or have the wrong shape.
    """
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    # Copies: matching changes the state of some of them.
    mapping = deepcopy(load_config.weight_mapping or [])
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state = model.state_dict()
    targets = {target.name: target for target in targets_of(model, load_config)}
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    plan: list[tuple[str, Target]] = []
    seen: set[str] = set()
    for key in sorted(headers, key=dot_natural_key):
        name, pattern = rename_source_key(
            key, renamings, converters, model.base_model_prefix, state
        )
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], model.base_model_prefix, state)
        if pattern is not None:
            return "its weights are stored in another layout and have to be converted", []
        if name in seen:
            return f"two of its tensors stand for {name}", []
        if name not in targets:
            if name in tied:
                return f"it stores {name}, which this model shares with another weight", []
            continue  # transformers lists what it doesn't use
        stored, target = headers[key], targets[name]
        if stored.dtype not in TORCH_DTYPE:
            return f"{key} is stored as {stored.dtype}", []
        if stored.shape != target.shape:
            raise CheckpointError(
                f"{stored.path}: {key} has the shape {list(stored.shape)}, the model's "
                f"config.json says {list(target.shape)}; the two do not belong together"
            )
        seen.add(name)
        plan.append((key, target))
    missing = missing_tensors(model, set(targets) - seen)
    if missing:
        raise CheckpointError(missing_message(source, missing))
    return None, plan


def missing_tensors(model: Any, names: set[str]) -> list[str]:
    """Of ``names``, those that the model class does not declare as legitimately absent."""
    patterns = list(getattr(model, "_keys_to_ignore_on_load_missing", None) or ())
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    return sorted(
        name for name in names - tied if not any(re.search(pattern, name) for pattern in patterns)
    )


def missing_message(source: str, missing: list[str]) -> str:
    return (
        f"{source}: {len(missing)} of the model's tensors are not in the checkpoint, first "
        f"{missing[0]}; download it again, or give the config.json that belongs to it"
    )
