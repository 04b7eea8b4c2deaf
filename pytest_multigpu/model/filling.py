"""How weights get into a model that ``from_pretrained`` has built and placed.

Everything around the weights stays transformers' own: configuration, quantiser, device map,
renaming, tying, buffers, hooks. Only the one step that moves them is replaced, in a subclass
that lives for one load: the tensors that it feeds to transformers' own loop come from parallel
reads (:mod:`.reader`) or are synthesised (:mod:`.synthetic`), already on their device.

May import records, errors, units and siblings; torch and transformers in functions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from typing import Any

from ..errors import CheckpointError, LoadError
from ..records.progress import Progress
from ..units import MIB, gib
from .quantise import QuantiseInPlace, is_bitsandbytes, stored_bytes
from .reader import ReadAhead, ReadJob
from .safetensors_index import TORCH_DTYPE, StoredTensor
from .synthetic import SyntheticTensor, SyntheticWeights

OWN, STOCK = "pytest-multigpu", "transformers"


class Meter:
    """Counts bytes from any thread and tells the listener, at most ten times a second."""

    def __init__(self, listener: Callable[[Progress], None] | None) -> None:
        self._listener = listener
        self._lock = threading.Lock()
        self._started = time.perf_counter()
        self._told = 0.0
        self.total_bytes = 0
        self.done_bytes = 0

    def start(self, total_bytes: int) -> None:
        self._started = time.perf_counter()
        self.total_bytes, self.done_bytes = total_bytes, 0

    def add(self, count: int) -> None:
        with self._lock:
            self.done_bytes += count
            now = time.perf_counter()
            last = self.done_bytes >= self.total_bytes
            if self._listener is None or (now - self._told < 0.1 and not last):
                return
            self._told = now
            moment = Progress(
                bytes_done=self.done_bytes,
                bytes_total=self.total_bytes,
                seconds=now - self._started,
            )
            self._listener(moment)


@dataclasses.dataclass
class _Target:
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


class Filling:
    """Fills one model.

    :param headers: the checkpoint's tensors; None to synthesise them.
    :param loader: ``auto``, ``pytest-multigpu`` or ``transformers``.
    """

    def __init__(
        self,
        headers: Mapping[str, StoredTensor] | None,
        *,
        source: str,
        loader: str = "auto",
        progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self._headers, self._source = headers, source
        self._loader = loader
        self.meter = Meter(progress)
        self.notes: list[str] = []
        self.used = STOCK
        self.failure: BaseException | None = None
        """What really went wrong, where transformers would only log it."""

    def subclass(self, cls: Any) -> Any:
        """``cls`` under its own name, with the step that moves the weights replaced."""
        fill = self._fill

        def _load_pretrained_model(
            model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *rest: Any
        ) -> Any:
            def stock(tensors: Any) -> Any:
                return cls._load_pretrained_model(
                    model, tensors, None if tensors else checkpoint_files, load_config, *rest
                )

            return fill(model, load_config, stock)

        return type(
            cls.__name__,
            (cls,),
            {
                "_load_pretrained_model": staticmethod(_load_pretrained_model),
                "__module__": cls.__module__,
                "__qualname__": cls.__qualname__,
                "__doc__": cls.__doc__,
            },
        )

    def _fill(self, model: Any, load_config: Any, stock: Callable[[Any], Any]) -> Any:
        obstacle = self._obstacle(load_config)
        if self._headers is None:
            targets = _targets(model, load_config)
            self.meter.start(sum(target.size_bytes for target in targets))
            with _synthetic(model, targets) as weights:
                if obstacle is not None:
                    self._stock_because(obstacle)
                    return stock({t.name: self._lazy(weights, t) for t in targets})
                self.used = OWN
                return self._synthesise(model, load_config, targets, weights)
        self.meter.start(sum(stored.size_bytes for stored in self._headers.values()))
        if obstacle is None:
            obstacle, plan = _match(model, self._headers, load_config, self._source)
        if obstacle is not None:
            self._stock_because(obstacle)
            return stock(None)
        self.used = OWN
        return self._read(model, load_config, plan)

    def _obstacle(self, load_config: Any) -> str | None:
        """Why this load is left to transformers; None if it need not be."""
        if self._loader == STOCK:
            return ""
        quantizer = load_config.hf_quantizer
        if "disk" in (load_config.device_map or {}).values():
            return "parts of the model are offloaded to disk"
        if quantizer is not None and quantizer.pre_quantized:
            return "the checkpoint is quantised already"
        if quantizer is not None and not is_bitsandbytes(quantizer):
            return f"{type(quantizer).__name__} is no quantiser that it knows"
        return None

    def _stock_because(self, obstacle: str) -> None:
        self.used = STOCK
        if obstacle:
            self.notes.append(f"loaded by transformers' own loader: {obstacle}")

    def _lazy(self, weights: SyntheticWeights, target: _Target) -> SyntheticTensor:
        def make() -> Any:
            tensor = weights.make(target.name)
            self.meter.add(target.size_bytes)
            return tensor

        return SyntheticTensor(make, target.shape, target.dtype)

    # -- synthesised -----------------------------------------------------------------------

    def _synthesise(
        self, model: Any, load_config: Any, targets: list[_Target], weights: SyntheticWeights
    ) -> Any:
        """Tensors to be quantised are made in one scratch buffer per device, one after another."""
        quantizer = load_config.hf_quantizer
        buffers = _scratch(targets)

        def lazy(target: _Target) -> SyntheticTensor:
            def make() -> Any:
                if self.failure is not None:
                    raise self.failure
                out = None
                if target.quantised:
                    flat = buffers[target.device][: target.size_bytes]
                    out = flat.view(target.dtype).view(target.shape)
                tensor = weights.make(target.name, out)
                self.meter.add(target.size_bytes)
                return tensor

            return SyntheticTensor(make, target.shape, target.dtype)

        with self._own_quantiser(quantizer, targets, lambda _: None, self._fail):
            _reserve(targets, quantizer)
            return _convert(model, {t.name: lazy(t) for t in targets}, load_config)

    def _fail(self, error: BaseException) -> None:
        if self.failure is None:
            self.failure = error

    # -- read ------------------------------------------------------------------------------

    def _read(self, model: Any, load_config: Any, plan: list[tuple[str, _Target]]) -> Any:
        quantizer = load_config.hf_quantizer
        headers = self._headers or {}
        jobs = {
            key: ReadJob(stored=headers[key], device=target.device, quantised=target.quantised)
            for key, target in plan
        }
        by_target = {target.name: jobs[key] for key, target in plan}
        targets = [target for _, target in plan]
        with ReadAhead(list(jobs.values()), report=self.meter.add) as reader:

            def failed(error: BaseException) -> None:
                self._fail(error)
                reader.fail(error)

            def done(name: str) -> None:
                reader.consumed(by_target[name])

            try:
                with self._own_quantiser(quantizer, targets, done, failed):
                    _reserve(targets, quantizer)
                    self.meter.start(sum(job.stored.size_bytes for job in jobs.values()))
                    reader.start()
                    # What the model has no use for is passed on by name: transformers lists it.
                    pending: dict[str, Any] = dict.fromkeys(headers)
                    pending.update((key, reader.pending(job)) for key, job in jobs.items())
                    return _convert(model, pending, load_config)
            finally:
                if reader.error is not None:
                    self._fail(reader.error)

    @contextlib.contextmanager
    def _own_quantiser(
        self,
        quantizer: Any,
        targets: list[_Target],
        done: Callable[[str], None],
        failed: Callable[[BaseException], None],
    ) -> Iterator[None]:
        """transformers' quantiser with its operation replaced, for as long as this lasts."""
        import torch

        if quantizer is None:
            yield
            return
        halves = {}
        if type(quantizer).__name__ == "Bnb8BitHfQuantizer":
            # int8 is made from float16, whatever the weights are.
            halves = _scratch(
                [
                    dataclasses.replace(target, dtype=torch.float16)
                    for target in targets
                    if target.dtype != torch.float16
                ]
            )

        def half(weight: Any) -> Any:
            buffer = halves.get(weight.device)
            if buffer is None:
                return None
            return buffer.view(torch.float16)[: weight.numel()].view(weight.shape)

        operation = QuantiseInPlace(quantizer, done=done, failed=failed, half=half)
        quantizer.get_quantize_ops = lambda: operation
        try:
            yield
        finally:
            del quantizer.get_quantize_ops
            halves.clear()


def _scratch(targets: list[_Target]) -> dict[Any, Any]:
    """Per device, a flat uint8 buffer as large as the largest tensor to be quantised there."""
    import torch

    largest: dict[Any, int] = {}
    for target in targets:
        if target.quantised:
            largest[target.device] = max(largest.get(target.device, 0), target.size_bytes)
    return {
        device: torch.empty(size, dtype=torch.uint8, device=device)
        for device, size in largest.items()
    }


def _convert(model: Any, tensors: Mapping[str, Any], load_config: Any) -> Any:
    """transformers' own loop over lazy tensors: renames, casts, quantises, sets."""
    from transformers.core_model_loading import convert_and_load_state_dict_in_model

    return convert_and_load_state_dict_in_model(
        model=model, state_dict=tensors, load_config=load_config, disk_offload_index=None
    )


def _targets(model: Any, load_config: Any) -> list[_Target]:
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
            _Target(name, tuple(tensor.shape), dtype, _device(places[name]), quantised=quantised)
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


def _synthetic(model: Any, targets: list[_Target]) -> SyntheticWeights:
    head = model.get_output_embeddings()
    head_weight = getattr(head, "weight", None)
    name = next(
        (name for name, parameter in model.named_parameters() if parameter is head_weight), None
    )
    return SyntheticWeights(
        {target.name: target.shape for target in targets},
        {target.name: target.dtype for target in targets},
        {target.name: target.device for target in targets},
        name,
    )


def _match(
    model: Any, headers: Mapping[str, StoredTensor], load_config: Any, source: str
) -> tuple[str | None, list[tuple[str, _Target]]]:
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
    targets = {target.name: target for target in _targets(model, load_config)}
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    plan: list[tuple[str, _Target]] = []
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
    import re

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


def _reserve(targets: list[_Target], quantizer: Any) -> None:
    """Ask each GPU for its weights in one piece, which the allocator then deals out.

    One large request instead of hundreds, no slack between tensors, and a GPU that is too full
    is named before anything is read. Scratch memory must have been taken before, or it would
    be cut from that piece.

    :raises LoadError: a GPU has less free than its weights take.
    """
    import torch

    wanted: dict[Any, int] = {}
    for target in targets:
        if target.device.type != "cuda":
            continue
        sizes = stored_bytes(quantizer, target.shape) if target.quantised else (target.size_bytes,)
        for size in sizes:
            # Below 1 MiB the allocator uses another pool; it rounds the rest to 512 bytes.
            if size > MIB:
                wanted[target.device] = wanted.get(target.device, 0) + -(-size // 512) * 512
    if wanted:
        torch.cuda.empty_cache()
    for device, size in wanted.items():
        free, _ = torch.cuda.mem_get_info(device)
        if free < size:
            raise LoadError(
                f"GPU {device.index}: out of memory: its weights take {gib(size)}, {gib(free)} "
                "are free; plan for the free memory or free it (nvidia-smi shows who holds it)"
            )
        torch.empty(size, dtype=torch.uint8, device=device)
