"""How weights get into a model that ``from_pretrained`` has built and placed.

Everything around the weights stays transformers' own: configuration, quantiser, device map,
renaming, tying, buffers, hooks. Only the one step that moves them is replaced, in a subclass
that lives for one load: the tensors that it feeds to transformers' own loop come from parallel
reads (:mod:`.reader`) or are synthesised (:mod:`.synthetic`), already on their device.

May import records, errors, units, what the machine says of torch's allocator, and siblings; torch
and transformers in functions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..errors import LoadError
from ..machine.torch_allocator import cuts_large_blocks
from ..records.progress import Progress
from ..units import MIB, gib
from .initial import starts_at_zero
from .matching import Target, match, targets_of
from .progress_meter import Meter
from .quantise import QuantiseInPlace, is_bitsandbytes, stored_bytes
from .read_jobs import ReadJob
from .reader import ReadAhead
from .safetensors_index import StoredTensor
from .synthetic import SyntheticTensor, SyntheticWeights
from .torch_caches import give_back_cached, wait_for_devices

OWN, STOCK = "pytest-multigpu", "transformers"


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
            targets = targets_of(model, load_config)
            self.meter.start(sum(target.size_bytes for target in targets))
            with _synthetic(model, targets) as weights:
                if obstacle is not None:
                    self._stock_because(obstacle)
                    return stock({t.name: self._lazy(weights, t) for t in targets})
                self.used = OWN
                return self._synthesise(model, load_config, targets, weights)
        self.meter.start(sum(stored.size_bytes for stored in self._headers.values()))
        if obstacle is None:
            obstacle, plan = match(model, self._headers, load_config, self._source)
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

    def _lazy(self, weights: SyntheticWeights, target: Target) -> SyntheticTensor:
        def make() -> Any:
            tensor = weights.make(target.name)
            self.meter.add(target.size_bytes)
            return tensor

        return SyntheticTensor(make, target.shape, target.dtype)

    # -- synthesised -----------------------------------------------------------------------

    def _synthesise(
        self, model: Any, load_config: Any, targets: list[Target], weights: SyntheticWeights
    ) -> Any:
        """Tensors to be quantised are made in one scratch buffer per device, one after another."""
        quantizer = load_config.hf_quantizer
        buffers = _scratch(targets)

        def lazy(target: Target) -> SyntheticTensor:
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

    def _read(self, model: Any, load_config: Any, plan: list[tuple[str, Target]]) -> Any:
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
        targets: list[Target],
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


def _scratch(targets: list[Target]) -> dict[Any, Any]:
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

    info = convert_and_load_state_dict_in_model(
        model=model, state_dict=tensors, load_config=load_config, disk_offload_index=None
    )
    # accelerate empties the caches next, see give_back_cached.
    wait_for_devices()
    return info


def _synthetic(model: Any, targets: list[Target]) -> SyntheticWeights:
    head = model.get_output_embeddings()
    head_weight = getattr(head, "weight", None)
    name = next(
        (name for name, parameter in model.named_parameters() if parameter is head_weight), None
    )
    return SyntheticWeights(
        {target.name: target.shape for target in targets},
        {target.name: target.dtype for target in targets},
        {target.name: target.device for target in targets},
        head=name,
        zeros=starts_at_zero(model),
    )


def _reserve(targets: list[Target], quantizer: Any) -> None:
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
        give_back_cached()
    for device, size in wanted.items():
        free, _ = torch.cuda.mem_get_info(device)
        if free < size:
            raise LoadError(
                f"GPU {device.index}: out of memory: its weights take {gib(size)}, {gib(free)} "
                "are free; plan for the free memory or free it (nvidia-smi shows who holds it)"
            )
        if cuts_large_blocks(os.environ):  # else it would lie there beside the weights
            torch.empty(size, dtype=torch.uint8, device=device)
