"""The residual stream by forward hooks, each on its block's own device.

A hook is a plain ``torch.nn.Module`` forward hook: it runs after the dispatcher's own wrapper of
``forward``, sees what the next block will be given, and changes nothing. The decoder is called
without the head, so that each activation stays where its block is. Imports errors and decoders;
torch inside functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..decoders import decoder_of
from ..errors import ScoringError, first_line
from .probe import Probe, Site

if TYPE_CHECKING:
    import torch

_LAYERS = ("layers", "h", "blocks")
_NORMS = (
    "norm",
    "final_layernorm",
    "ln_f",
    "final_layer_norm",
    "norm_f",
    "final_norm",
    "ln_out",
    "out_norm",
    "layer_norm",
    "layernorm",
    "embedding_norm",
)

_LATE = ("mamba", "mamba2", "falcon_mamba", "rwkv")
"""``model_type`` of those whose ``hidden_states[0]`` is the first block's output."""


class _EnoughLayersError(BaseException):
    """Leaves a forward once the last layer that is needed has run.

    Not an ``Exception``: model code that catches those must not swallow it.
    """


@dataclass(frozen=True)
class Anatomy:
    """Where a decoder keeps its parts."""

    decoder: Any
    embedding: Any
    blocks: Any
    norm: Any

    @property
    def num_layers(self) -> int:
        return len(self.blocks)

    def source(self, layer: int) -> Any:
        """The module whose output is ``hidden_states[layer]``, before any norm; for layer 0 the
        block whose input it is: some decoders add positions to the embedding's output first.

        :raises ScoringError: no such layer.
        """
        if not 0 <= layer <= self.num_layers:
            raise ScoringError(out_of_range(layer, self.num_layers))
        return self.blocks[max(0, layer - 1)]


def out_of_range(layer: int, num_layers: int) -> str:
    """What to say of a layer that a model lacks."""
    return (
        f"layer {layer} is out of range: the model has hidden_states 0 to {num_layers}; "
        "use a probe of this model"
    )


def check_hidden_size(probe: Probe, layer: int, stream: torch.Tensor) -> None:
    """:raises ScoringError: the probe is of a model with another hidden size."""
    if stream.shape[-1] != probe.hidden_size:
        raise ScoringError(
            f"the probe has hidden size {probe.hidden_size}, hidden_states[{layer}] "
            f"{stream.shape[-1]}; use a probe of this model"
        )


def anatomy(model: Any) -> Anatomy:
    """:raises ScoringError: no embedding, no decoder layers or final norm of a known name, or
    hidden states that are counted otherwise."""
    decoder = decoder_of(model)
    kind = type(model).__name__
    if model.config.model_type in _LATE:
        raise ScoringError(
            f"{kind}'s hidden_states begin after the first block, so that a layer's index means "
            "another place; probes can't read it"
        )
    embedding = decoder.get_input_embeddings()
    if embedding is None:
        raise ScoringError(f"{kind} has no input embeddings; probes can't read it")
    parts = [embedding]
    for names in (_LAYERS, _NORMS):
        found = next((getattr(decoder, name) for name in names if hasattr(decoder, name)), None)
        if found is None:
            raise ScoringError(f"{kind} has none of {', '.join(names)}; probes can't read it")
        parts.append(found)
    return Anatomy(decoder, *parts)


def stream_of(output: Any, layer: int) -> torch.Tensor:
    """The residual stream ``(batch, tokens, hidden)`` of a block's output, which is a tensor or
    a tuple that begins with one. A tensor is never indexed: ``output[0]`` is batch row 0.

    :raises ScoringError: anything else.
    """
    import torch

    found = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(found, torch.Tensor) or found.ndim != 3:
        shape = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise ScoringError(f"hidden_states[{layer}] is {shape}, not (batch, tokens, hidden)")
    return found


@contextmanager
def watching(
    model: Any, layers: Sequence[int], see: Callable[[int, torch.Tensor], None]
) -> Iterator[None]:
    """Calls ``see(layer, stream)`` whenever a listed layer has run; hooks are always removed.

    :raises ScoringError: a layer that the model lacks.
    """
    with noting(model, layers, lambda layer, output: see(layer, stream_of(output, layer))):
        yield


@contextmanager
def noting(model: Any, layers: Sequence[int], note: Callable[[int, Any], None]) -> Iterator[None]:
    """The same with a layer's output as it is, whatever that may be.

    :raises ScoringError: a layer that the model lacks.
    """
    with ExitStack() as stack:
        for layer in layers:

            def look(output: Any, layer: int = layer) -> None:
                note(layer, output)

            stack.enter_context(hooked(model, layer, look))
        yield


@contextmanager
def hooked(model: Any, layer: int, look: Callable[[Any], Any]) -> Iterator[None]:
    """Calls ``look(hidden_states[layer] as it is)`` whenever it is there; what it returns, if
    anything, takes its place.

    :raises ScoringError: a layer that the model lacks.
    """
    module = anatomy(model).source(layer)
    if layer == 0:

        def before(_module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            new = look(args[0] if args else kwargs["hidden_states"])
            if new is None:
                return None
            return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = module.register_forward_hook(lambda _module, _args, output: look(output))
    try:
        yield
    finally:
        handle.remove()


def capture(
    model: Any,
    input_ids: torch.Tensor,
    layers: Sequence[int],
    *,
    attention_mask: torch.Tensor | None = None,
    early_exit: bool = True,
) -> dict[int, torch.Tensor]:
    """Residual stream of one forward at ``layers`` (``hidden_states`` indices, before the norm).

    :param input_ids: ``(batch, tokens)``, moved to the embedding's device.
    :param attention_mask: 1 for tokens, 0 for padding on either side; positions count tokens only.
    :param early_exit: leave the forward after the last layer that is needed.
    :returns: layer to ``(batch, tokens, hidden)`` in the model's dtype on the block's own device.
    :raises ScoringError: a layer out of range or one that never ran, or the forward failed.
    """
    found: dict[int, torch.Tensor] = {}
    wanted = set(layers)

    def see(layer: int, stream: torch.Tensor) -> None:
        found[layer] = stream
        if early_exit and len(found) == len(wanted):
            raise _EnoughLayersError

    with watching(model, sorted(wanted), see):
        try:
            forward(model, input_ids, attention_mask=attention_mask)
        except _EnoughLayersError:
            pass
        except ScoringError:
            raise
        except Exception as error:
            text = f"the forward failed: {type(error).__name__}: {first_line(error)}"
            raise ScoringError(text) from error
    check_ran(wanted, found)
    shape = tuple(input_ids.shape)
    for layer, stream in found.items():
        if tuple(stream.shape[:2]) != shape:
            raise ScoringError(
                f"hidden_states[{layer}] has shape {tuple(stream.shape)} for input {shape}"
            )
    return found


def forward(model: Any, input_ids: torch.Tensor, **options: Any) -> Any:
    """One pass of the decoder without head or cache; what :func:`capture` runs.

    ``attention_mask`` is dropped where it masks nothing, as the model then takes its fast path.
    """
    import torch

    parts = anatomy(model)
    device = runs_on(parts.embedding)
    mask = options.pop("attention_mask", None)
    if mask is not None and not bool(mask.bool().all()):
        mask = mask.to(device)
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        options.update(attention_mask=mask, position_ids=positions)
    # Not inference_mode: int8 layers keep state made in their first forward.
    with torch.no_grad():
        return parts.decoder(input_ids=input_ids.to(device), use_cache=False, **options)


def runs_on(module: Any) -> torch.device:
    """The device a module computes on: its weights', or where its dispatcher brings them.

    :raises ScoringError: it has none, or they are not loaded.
    """
    import torch

    weight = next(module.parameters(), None)
    if weight is None:
        raise ScoringError(f"{type(module).__name__} has no weights that tell where it computes")
    device: torch.device = weight.device
    if device.type != "meta":
        return device
    where = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    if where is None:
        raise ScoringError(f"the weights of {type(module).__name__} are not loaded (device meta)")
    return torch.device(f"cuda:{where}" if isinstance(where, int) else where)


def check_ran(wanted: set[int], found: dict[int, Any]) -> None:
    """:raises ScoringError: a layer's hook never ran."""
    missing = sorted(wanted - set(found))
    if missing:
        raise ScoringError(
            f"the hook on hidden_states[{missing[0]}] never ran: its module was replaced or moved "
            "after the hook was set; set hooks on the model as it runs"
        )


def local_norm(model: Any, device: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """The model's final norm on ``device``: same class, same settings, its weight copied there.

    Made afresh instead of deep-copied: a dispatched norm carries a wrapper that would send its
    input to the norm's own device.

    :raises ScoringError: the weight is not loaded.
    """
    import torch

    norm = anatomy(model).norm
    clone = torch.nn.Module.__new__(type(norm))
    torch.nn.Module.__init__(clone)
    for name, value in vars(norm).items():
        if name not in vars(clone) and name not in ("forward", "_hf_hook", "_old_forward"):
            setattr(clone, name, value)
    for name in norm._parameters:
        clone.register_parameter(name, None)
    for name, weight in [*norm.named_parameters(), *norm.named_buffers()]:
        if weight.device.type == "meta":
            raise ScoringError(f"the final norm's {name} is not loaded; site final_norm needs it")
        clone._parameters.pop(name, None)
        clone.register_buffer(name, weight.detach().to(device))

    def apply(stream: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            normed: torch.Tensor = type(norm).forward(clone, stream)
        return normed

    return apply


def at_site(model: Any, stream: torch.Tensor, site: Site) -> torch.Tensor:
    """``stream`` as a probe of that site reads it, on the same device."""
    return local_norm(model, stream.device)(stream) if site == "final_norm" else stream
