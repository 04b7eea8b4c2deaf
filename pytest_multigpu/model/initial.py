"""Which vectors a model starts at zero: norms whose weight is added to one (Gemma's, Qwen3-Next's).

Asked of the model's own initialisation, on a copy of the module with small tensors on the CPU, so
no family is known here. torch in functions; imports nothing of the package.
"""

from __future__ import annotations

import copy
from typing import Any


def starts_at_zero(model: Any) -> frozenset[str]:
    """Names of the vectors that :meth:`_init_weights` sets to zero, in modules of vectors alone.

    :param model: a ``PreTrainedModel``, on any device; it stays as it is.
    """
    known: dict[object, tuple[str, ...]] = {}
    names = []
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if not own or any(parameter.ndim != 1 for parameter in own.values()):
            continue
        key = (type(module), *((name, parameter.shape) for name, parameter in own.items()))
        if key not in known:
            known[key] = _zeroed(model, module, own)
        names += [f"{path}.{name}" for name in known[key]]
    return frozenset(names)


def _zeroed(model: Any, module: Any, own: dict[str, Any]) -> tuple[str, ...]:
    import torch

    stand_in = copy.copy(module)
    stand_in._parameters = {
        name: torch.nn.Parameter(torch.ones(parameter.shape), requires_grad=False)
        for name, parameter in own.items()
    }
    model._init_weights(stand_in)
    return tuple(name for name, value in stand_in._parameters.items() if not value.any())
