"""Every allocation and release of code that runs on the meta device, in order.

A dispatch mode sees each tensor's storage come, a finalizer sees it go: Python's own references
decide, as they do on a GPU. A function mode stands in where the meta device takes another way than
CUDA:

* ``scaled_dot_product_attention``: the meta device would take the math path. A CUDA kernel (cuDNN,
  flash or memory-efficient; head sizes that none of them takes are not met in practice) makes its
  output, laid out like the query, and fp32 statistics; what it does with a mask is one step of its
  own, so that it can be priced.
* ``softmax(dtype=float32)``: CUDA converts float16 on the way, bfloat16 in a copy before
  (``aten/src/ATen/native/SoftMax.cpp``).
* the truth of a tensor: there is none. What transformers asks in a pass is whether a mask masks
  nothing and whether positions are those of one sequence; the caller says.
* Linears that the tier quantises are noted as such; what they take is for the plan to say.

What kernels take inside (workspaces, sorting) is not seen. torch at module level: import this
module inside functions. May import records.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..records.passes import Op


class TooManyStepsError(Exception):
    """The code allocates so often that it must loop over tokens or experts."""


class Event(NamedTuple):
    """As ``records.passes.Step``, with a number where that has a formula."""

    op: Op
    tensor: int
    number: int
    rows: int
    columns: int
    segment: int


class Recording:
    """``with recording: ...`` records; :attr:`segment` is the caller's, to tell parts apart."""

    def __init__(
        self, model: Any, *, truth: bool, quantised: Collection[int] = (), most: int = 10_000
    ) -> None:
        """
        :param model: its parameters and buffers are there already.
        :param truth: what every tensor is if it is asked.
        :param quantised: ``id`` of the weights that the tier quantises.
        :param most: events, before :class:`TooManyStepsError`.
        """
        self.events: list[Event] = []
        self.segment = 0
        self.truth = truth
        self.quantised = quantised
        self.most = most
        self.fed: set[tuple[int, int, int]] = set()
        """Of each quantised Linear: ``id`` of the weight, its input's number and dimensions."""
        self._known = {_key(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self._alive: dict[int, int] = {}
        self._paused = False
        self._count = 0
        self._modes: contextlib.ExitStack | None = None

    def __enter__(self) -> Recording:
        self._modes = contextlib.ExitStack()
        self._modes.enter_context(torch.no_grad())
        self._modes.enter_context(_Functions(self))
        self._modes.enter_context(_Dispatch(self))
        return self

    def __exit__(self, *_: object) -> None:
        assert self._modes is not None  # entered
        self._modes.close()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is made meanwhile is there already as far as the recording goes."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def tensor(self, value: Any) -> int:
        """The number of a tensor that was recorded and is alive; 0 for another."""
        return self._alive.get(_key(value), 0)

    def note(self, op: Op, tensor: int, number: int = 0, rows: int = 0, columns: int = 0) -> None:
        if len(self.events) >= self.most:
            raise TooManyStepsError(f"more than {self.most} steps")
        self.events.append(Event(op, tensor, number, rows, columns, self.segment))

    def number(self) -> int:
        self._count += 1
        return self._count

    def see(self, result: Any, inputs: Any) -> None:
        """Notes the storages of ``result`` that are new."""
        for value in tree_leaves(result):
            if not isinstance(value, torch.Tensor):
                continue
            key = _key(value)
            if key in self._alive or key in self._known:
                continue
            if self._paused:
                self._hold(value, 0)
            elif key not in {_key(x) for x in tree_leaves(inputs) if isinstance(x, torch.Tensor)}:
                tensor = self.number()
                self.note("take", tensor, value.untyped_storage().nbytes())
                self._hold(value, tensor)

    def linear(self, x: Any, weight: Any, rows: int, columns: int) -> Any:
        """A Linear that the tier quantises: its output, and a step that names its shape."""
        self.fed.add((id(weight), self.tensor(x), x.dim()))
        x = x.contiguous()  # a copy is recorded where it is one
        with self.paused():
            out = torch.empty(*x.shape[:-1], rows, dtype=x.dtype, device=weight.device)
            tensor = self.number()
            self._hold(out, tensor)
        self.note("linear", tensor, x.numel() // columns, rows, columns)
        return out

    def _hold(self, value: Any, tensor: int) -> None:
        storage = value.untyped_storage()
        key = storage._cdata
        self._alive[key] = tensor
        weakref.finalize(storage, self._gone, key).atexit = False

    def _gone(self, key: int) -> None:
        tensor = self._alive.pop(key, 0)
        if tensor:
            self.events.append(Event("drop", tensor, 0, 0, 0, self.segment))


def _key(tensor: Any) -> int:
    return int(tensor.untyped_storage()._cdata)


class _Dispatch(TorchDispatchMode):
    def __init__(self, recording: Recording) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recording = recording

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self._recording.see(result, (args, kwargs))
        return result


class _Functions(TorchFunctionMode):
    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self._recording = recording

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        functional = torch.nn.functional
        if func is torch.Tensor.__bool__:
            return self._recording.truth
        if func is functional.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if func is functional.softmax and kwargs.get("dtype") is torch.float32:
            if args[0].dtype is torch.float16:
                return torch._softmax(args[0], kwargs.get("dim", -1), True)
        elif func is functional.linear and id(args[1]) in self._recording.quantised:
            rows, columns = args[1].shape
            return self._recording.linear(args[0], args[1], rows, columns)
        elif func is torch.addmm and id(args[2]) in self._recording.quantised:
            columns, rows = args[2].shape  # transformers' Conv1D
            return self._recording.linear(args[1], args[2], rows, columns)
        return func(*args, **kwargs)

    def _attention(
        self, query: Any, key: Any, value: Any, attn_mask: Any = None, *_: Any, **__: Any
    ) -> Any:
        """The output, ``(batch, heads, tokens, value_dim)``, in memory in the order of the query's
        dimensions, as flash and cuDNN lay it out."""
        del key
        recording, mask = self._recording, 0
        if attn_mask is not None:
            mask = recording.number()
            boolean = attn_mask.dtype is torch.bool
            recording.note("mask" if boolean else "bias", mask, attn_mask.numel())
        shape = (*query.shape[:-1], value.shape[-1])
        order = sorted(range(3), key=lambda dim: (-query.stride(dim), dim))
        laid_out = torch.empty(
            [shape[dim] for dim in order] + [shape[-1]], dtype=query.dtype, device=query.device
        )
        out = laid_out.permute(*(order.index(dim) for dim in range(3)), 3)
        statistics = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
        del statistics, laid_out
        if mask:
            recording.note("drop", mask)
        return out
