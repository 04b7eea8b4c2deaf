"""Bytes of tensors alive at the worst moment of a real pass on the CPU, every storage counted.

The attention kernel is CUDA's: on the CPU a mask, a head size or a data type that flash attention
there lacks would mean the math path with its score matrices.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(model: Any, call: Callable[[], Any], *, cache: Any = None) -> int:
    """Weights and buffers are not counted; what ``cache`` holds is."""
    count = _Count(model)
    for layer in cache.layers if cache is not None else ():
        count.see((layer.keys, layer.values))
    with torch.no_grad(), cuda_attention(), count:
        call()
    return count.peak


@contextmanager
def cuda_attention() -> Iterator[None]:
    """Attention takes what a CUDA kernel would; its result is 0."""
    with _Attention():
        yield


class _Count(TorchDispatchMode):
    def __init__(self, model: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._known = {_key(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.see(result)
        return result

    def see(self, result: Any) -> None:
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                key = _key(tensor)
                if key not in self._alive and key not in self._known:
                    storage = tensor.untyped_storage()
                    self._alive[key] = storage.nbytes()
                    weakref.finalize(storage, self._alive.pop, key, None)
        self.peak = max(self.peak, sum(self._alive.values()))


def _key(tensor: Any) -> int:
    return int(tensor.untyped_storage()._cdata)


class _Attention(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, value, mask = args[0], args[2], kwargs.get("attn_mask")
        additive = None
        if mask is not None and mask.dtype is torch.bool:
            inverted = mask.logical_not()
            additive = torch.zeros(mask.shape, dtype=query.dtype)
            del inverted
        batch, heads, tokens, _ = query.shape
        out = torch.zeros(batch, tokens, heads, value.shape[-1], dtype=query.dtype)
        statistics = torch.empty(batch, heads, tokens, dtype=torch.float32)
        del statistics, additive
        return out.transpose(1, 2)
