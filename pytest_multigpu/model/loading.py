"""``load_model``: a causal LM on its devices, from a checkpoint or with synthesised weights.

May import records, errors, units and siblings; torch and transformers in functions.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal

from ..errors import CheckpointError, LoadError, UsageError
from ..records.model import LoadReport, PeakReading, PhasePeaks
from ..records.plan import Architecture, Plan, Tier
from ..records.progress import Progress
from .failures import let_go, problem
from .filling import STOCK, Filling
from .loaded import LoadedModel, empty_caches, empty_modules, free_devices
from .matching import missing_message, missing_tensors
from .placement import observe
from .quantise import quantization_config
from .safetensors_index import checkpoint_files, read_headers
from .tokenizer import tokenizer_for
from .torch_caches import devices_in_use, wait_for_devices
from .torch_peaks import keep_open_peaks

if TYPE_CHECKING:
    from .config import ResolvedModel

Loader = Literal["auto", "pytest-multigpu", "transformers"]
Weights = Literal["auto", "synthetic", "checkpoint"]


def load_model(
    model: str | ResolvedModel,
    *,
    tier: Tier,
    dtype: str = "bfloat16",
    device_map: Mapping[str, int | str] | str = "auto",
    max_memory: Mapping[int | str, int | str] | None = None,
    weights: Weights = "auto",
    progress: Callable[[Progress], None] | None = None,
    loader: Loader = "auto",
    plan: Plan | None = None,
    architecture: Architecture | None = None,
) -> LoadedModel:
    """Load ``model`` as ``AutoModelForCausalLM.from_pretrained`` would, bit for bit, but faster.

    :param model: a preset's name, a folder, a hub id, or what ``resolve_config`` made of one.
    :param tier: ``16bit`` (also ``cpu``), ``8bit`` (LLM.int8) or ``4bit`` (nf4).
    :param dtype: of what is not quantised: ``bfloat16``, ``float16``, ``float32``.
    :param device_map: block to CUDA index, ``cpu`` or ``disk``; or ``auto``, transformers' choice.
    :param max_memory: what ``auto`` may put on each GPU and on ``cpu``, in bytes or as ``36GiB``.
    :param weights: ``auto`` takes the checkpoint if it is on this machine.
    :param progress: called from any thread, at most ten times a second.
    :param loader: ``transformers`` for its own loader; ``auto`` takes that one only for what the
        fast one doesn't cover, and says so in ``load.notes``.
    :raises UsageError: no such model, or no checkpoint where one was asked for.
    :raises CheckpointError: files are missing, damaged or belong to another model.
    :raises LoadError: it does not fit, or transformers refused.

    Whatever goes wrong, an interrupt included, the GPUs are free again afterwards.
    """
    from .config import resolve_config

    resolved = resolve_config(model) if isinstance(model, str) else model
    checkpoint = _checkpoint(resolved, weights)
    headers = None
    if checkpoint is not None:
        files = checkpoint_files(checkpoint)
        headers = read_headers(files) if files is not None else {}
    filling = Filling(
        headers,
        source=str(checkpoint or resolved.name),
        loader=loader if headers is None or headers else STOCK,
        progress=progress,
    )
    if checkpoint is not None and not headers:
        filling.notes.append("loaded by transformers' own loader: it has no safetensors files")
    held: list[Any] = []
    try:
        cls, config, options = _recipe(resolved, checkpoint, tier, dtype, device_map)
        if max_memory is not None:
            options["max_memory"] = dict(max_memory)
        _wake_devices(device_map)
        started = time.perf_counter()
        _reset_peaks()
        assembled, info = _assemble(cls, config, options, checkpoint, filling)
        held.append(assembled)
        _check_complete(assembled, info, filling, checkpoint)
        wait_for_devices()
        seconds = time.perf_counter() - started
        tokenizer = _tokenizer(assembled, checkpoint, filling)
        if architecture is None:
            from .architecture import describe

            architecture = plan.architecture if plan else describe(resolved, tier=tier, dtype=dtype)
        peaks = _peaks()
        empty_caches()
        return LoadedModel(
            model=assembled,
            tokenizer=tokenizer,
            architecture=architecture,
            plan=plan,
            placement=observe(assembled),
            load=LoadReport(
                weights="synthetic" if checkpoint is None else "checkpoint",
                seconds=seconds,
                bytes=filling.meter.total_bytes,
                loader=filling.used,
                peaks=peaks,
                notes=tuple(filling.notes),
            ),
        )
    except BaseException as error:
        shown = problem(error, filling.failure, resolved.name)
        let_go(error)
        if filling.failure is not None:
            let_go(filling.failure)
        filling.failure = None
        for module in held:
            empty_modules(module)
        held.clear()
        free_devices()
        if shown is error:
            raise
        # The frames are empty now: naming the cause shows its lines and keeps no tensor alive.
        raise shown from (error if type(shown) is LoadError else None)


def import_all(resolved: ResolvedModel) -> None:
    """Imports what loading this model takes, but for its quantiser. Touches no GPU.

    :raises UsageError: transformers knows no such model.
    """
    from .meta import class_and_config

    class_and_config(resolved)
    import accelerate  # noqa: F401


def _checkpoint(resolved: ResolvedModel, weights: Weights) -> Any:
    if weights == "synthetic":
        return None
    if weights == "checkpoint" and resolved.checkpoint is None:
        raise UsageError(
            f"--gpu-weights=checkpoint: {resolved.name!r} has no checkpoint on this machine; "
            "give the folder that holds it with --gpu-model, or use --gpu-weights=synthetic"
        )
    return resolved.checkpoint


def _recipe(
    resolved: ResolvedModel,
    checkpoint: Any,
    tier: Tier,
    dtype: str,
    device_map: Mapping[str, int | str] | str,
) -> tuple[Any, Any, dict[str, Any]]:
    """Model class, config and ``from_pretrained``'s options; imports all that loading needs."""
    from .meta import class_and_config

    cls, config = class_and_config(resolved)
    import torch

    options: dict[str, Any] = {
        "dtype": getattr(torch, dtype),
        "device_map": device_map if isinstance(device_map, str) else dict(device_map),
    }
    stored = resolved.config_dict.get("quantization_config")
    if stored is not None and checkpoint is not None:
        config.quantization_config = dict(stored)  # the checkpoint's own quantisation
    else:
        quantization = quantization_config(tier, options["dtype"])
        if quantization is not None:
            options["quantization_config"] = quantization
    if checkpoint is None:
        options["state_dict"] = {}
    else:
        options["local_files_only"] = True
    return cls, config, options


def _wake_devices(device_map: Mapping[str, int | str] | str) -> None:
    """Create the CUDA contexts that the map needs at the same time, not one after the other.

    :raises LoadError: the map names a GPU that this process does not see.
    """
    cuda = _cuda()
    if isinstance(device_map, str) or not cuda.is_available():
        return
    wanted = {place for place in device_map.values() if isinstance(place, int)}
    absent = sorted(place for place in wanted if place >= cuda.device_count())
    if absent:
        raise LoadError(
            f"the device map names GPU {absent[0]}, this process sees "
            f"{cuda.device_count()}; correct the map or CUDA_VISIBLE_DEVICES"
        )
    if not wanted:
        return
    cuda.init()
    with ThreadPoolExecutor(max_workers=len(wanted)) as pool:
        list(pool.map(cuda.synchronize, sorted(wanted)))


def _assemble(
    cls: Any, config: Any, options: dict[str, Any], checkpoint: Any, filling: Filling
) -> tuple[Any, Mapping[str, Any]]:
    with _no_progress_bar():
        model, info = filling.subclass(cls).from_pretrained(
            None if checkpoint is None else str(checkpoint),
            config=config,
            output_loading_info=True,
            **options,
        )
    model.__class__ = cls
    model.requires_grad_(requires_grad=False)
    return model, info


def _check_complete(model: Any, info: Mapping[str, Any], filling: Filling, checkpoint: Any) -> None:
    """transformers fills missing tensors with random numbers and a warning; here that fails."""
    unused = sorted(info["unexpected_keys"])
    if unused:
        filling.notes.append(
            f"{len(unused)} tensors of the checkpoint are not used by the model, first {unused[0]}"
        )
    missing = missing_tensors(model, set(info["missing_keys"]))
    if not missing:
        return
    if checkpoint is None:
        raise LoadError(
            f"{len(missing)} tensors could not be synthesised, first {missing[0]}; "
            "this model needs a checkpoint"
        )
    raise CheckpointError(missing_message(str(checkpoint), missing))


def _tokenizer(model: Any, checkpoint: Any, filling: Filling) -> Any:
    text = model.config.get_text_config(decoder=True)
    length = getattr(text, "max_position_embeddings", None)
    tokenizer, note = tokenizer_for(checkpoint, int(text.vocab_size), length)
    if note is not None:
        filling.notes.append(note)
    _fit_generation(model, tokenizer, built_in=checkpoint is None or note is not None)
    return tokenizer


def _fit_generation(model: Any, tokenizer: Any, *, built_in: bool) -> None:
    """The ids that generation stops and pads with, for the tokenizer that is really there."""
    generation = model.generation_config
    if built_in:
        generation.bos_token_id = tokenizer.bos_token_id
        generation.eos_token_id = tokenizer.eos_token_id
        generation.pad_token_id = tokenizer.pad_token_id
    elif generation.pad_token_id is None and tokenizer.pad_token_id is not None:
        generation.pad_token_id = tokenizer.pad_token_id


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _cuda() -> Any:
    import torch

    return torch.cuda  # partly untyped


def _reset_peaks() -> None:
    cuda = _cuda()
    if not cuda.is_available() or not cuda.is_initialized():
        return
    keep_open_peaks()  # of a test that loads a model itself
    for index in range(cuda.device_count()):
        # A device that was never used has no peak, and says "Invalid device argument".
        with contextlib.suppress(RuntimeError):
            cuda.reset_peak_memory_stats(index)


def _peaks() -> PhasePeaks:
    cuda = _cuda()
    return PhasePeaks(
        phase="load",
        readings=tuple(
            PeakReading(
                device=f"cuda:{index}",
                allocated_bytes=cuda.max_memory_allocated(index),
                reserved_bytes=cuda.max_memory_reserved(index),
            )
            for index in devices_in_use()
        ),
    )
