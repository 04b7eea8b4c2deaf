"""A model on its devices, and how to let go of it.

May import records, errors and siblings; torch in functions.
"""

from __future__ import annotations

import contextlib
import gc
from dataclasses import dataclass
from typing import Any

from ..errors import LoadError
from ..records.model import LoadReport, Placement
from ..records.plan import Architecture, Plan
from .torch_caches import give_back_cached


@dataclass(frozen=True)
class LoadedModel:
    """A causal LM, loaded, in eval mode and without gradients. ``release`` frees it."""

    model: Any
    """``transformers.PreTrainedModel``; None once released."""
    tokenizer: Any
    """``transformers.PreTrainedTokenizerBase``."""
    architecture: Architecture
    plan: Plan | None
    """None if it was loaded without one (``load_model`` called by hand)."""
    placement: Placement
    """As observed after loading, whatever was planned."""
    load: LoadReport

    @property
    def input_device(self) -> Any:
        """``torch.device`` that token ids belong on: where the input embeddings run."""
        import torch

        embeddings = self.model.get_input_embeddings()
        # An offloaded embedding lies on "meta"; its hook says where it runs.
        hook = getattr(embeddings, "_hf_hook", None)
        device = getattr(hook, "execution_device", None)
        if device is None:
            device = embeddings.weight.device
        if isinstance(device, int):
            device = f"cuda:{device}"
        return torch.device(device)

    @property
    def cuda_devices(self) -> tuple[int, ...]:
        """CUDA indices that hold any weight, ascending."""
        return tuple(
            sorted(
                int(entry.device.partition(":")[2])
                for entry in self.placement.devices
                if entry.device.startswith("cuda:")
            )
        )

    @property
    def cuda_path(self) -> tuple[int, ...]:
        """CUDA indices in the order in which activations visit them; logits go back to the first.

        ``(0, 1, 0)`` for a model over two GPUs, ``(0,)`` on one.
        """
        path: list[int] = []
        for index in range(self.architecture.layers):
            device = self.layer_device(index)
            if device.type == "cuda" and path[-1:] != [device.index]:
                path.append(device.index)
        return (*path, path[0]) if len(path) > 1 else tuple(path)

    @property
    def decoder_layers(self) -> Any:
        """``torch.nn.ModuleList`` of the decoder layers, in forward order."""
        return decoder_layers(self.model)

    def layer_device(self, index: int) -> Any:
        """``torch.device`` on which decoder layer ``index`` (from 0) computes."""
        import torch

        layer = self.decoder_layers[index]
        device = getattr(getattr(layer, "_hf_hook", None), "execution_device", None)
        if device is None:
            device = next(layer.parameters()).device
        return torch.device(f"cuda:{device}" if isinstance(device, int) else device)


def decoder_layers(model: Any) -> Any:
    """The ``ModuleList`` that holds as many modules as the text config has hidden layers.

    :raises LoadError: the model has none, so it is no plain decoder.
    """
    return decoder_layers_named(model)[1]


def decoder_layers_named(model: Any) -> tuple[str, Any]:
    """Module path and ``ModuleList`` of the decoder layers (``model.layers``)."""
    import torch

    config = model.config
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    wanted = getattr(text, "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == wanted:
            return name, module
    raise LoadError(
        f"{type(model).__name__}: no list of {wanted} decoder layers found; only decoders with "
        "one ModuleList of layers can be checked"
    )


def release(loaded: LoadedModel | None) -> None:
    """Free the model: its weights, its hooks and what the allocator kept, on every device.

    Safe after failures and when called twice. ``loaded.model`` is None afterwards, so that
    whoever still holds ``loaded`` (a failed test's traceback) keeps no weights alive.
    """
    if loaded is not None and loaded.model is not None:
        model = loaded.model
        object.__setattr__(loaded, "model", None)
        empty_modules(model)
        del model
    free_devices()


def empty_modules(model: Any) -> None:
    """Drop every tensor of ``model``, even if something else still holds the module itself."""
    for module in list(model.modules()):
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        hook = module.__dict__.pop("_hf_hook", None)
        if hook is not None:
            module.__dict__.pop("_old_forward", None)
            module.__dict__.pop("forward", None)
        state: Any = getattr(module, "state", None)
        if type(state).__name__ == "MatmulLtState":  # int8: CB and SCB move here at first use
            state.CB = state.SCB = None
        if "quant_state" in module.__dict__:  # 4-bit: absmax is kept on the module as well
            module.__dict__["quant_state"] = None
        module._parameters.clear()
        module._buffers.clear()


def free_devices() -> None:
    """Collect garbage and give cached memory back, on the host and on each CUDA device."""
    gc.collect()
    empty_caches()


def empty_caches() -> None:
    """Give back what torch's allocators keep of freed memory, GPUs' and pinned."""
    import torch

    cuda: Any = torch.cuda  # partly untyped
    if not cuda.is_available() or not cuda.is_initialized():
        return
    # A GPU in a failed state must not hide the error that brought us here.
    with contextlib.suppress(RuntimeError):
        give_back_cached()
    empty_host_cache = getattr(torch._C, "_host_emptyCache", None)
    if empty_host_cache is not None:
        empty_host_cache()
