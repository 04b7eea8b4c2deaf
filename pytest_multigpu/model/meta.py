"""A model on the meta device, as ``from_pretrained`` has it just before it places the weights.

Both the byte count and the prediction of ``device_map="auto"`` look at this one object, built by
the installed transformers' own steps and the installed quantiser. torch and transformers are
imported inside the functions. May import decoders, errors, records and siblings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from ..decoders import decoder_of
from ..errors import UsageError
from ..importing import uncollected
from ..records.plan import Tier
from .bitsandbytes_import import import_bitsandbytes
from .config import OPTION, ResolvedModel

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True, kw_only=True)
class MetaModel:
    """A ``PreTrainedModel`` without data; in 8 and 4 bit its Linears are bitsandbytes' already."""

    model: Any
    quantizer: Any
    """transformers' ``HfQuantizer``; None in 16 bit."""
    config: Any
    """The ``PreTrainedConfig`` that the model was built from."""


_last: tuple[tuple[str, str, str, bool], MetaModel] | None = None


def build_meta_model(
    resolved: ResolvedModel, *, tier: Tier, dtype: str, double_quant: bool = False
) -> MetaModel:
    """The meta model of ``resolved``; the last one built is kept, since two callers want it.

    :param dtype: of what is not quantised: a key of :data:`DTYPE_BYTES`.
    :raises UsageError: a configuration that the installed transformers cannot build a causal
        language model from.
    :raises LoadError: bitsandbytes is needed and cannot be imported.
    """
    global _last  # noqa: PLW0603 - a cache of one, so that a plan builds its model once
    key = (_fingerprint(resolved.config_dict), tier, dtype, double_quant)
    if _last is None or _last[0] != key:
        _last = (
            key,
            new_meta_model(resolved, tier=tier, dtype=dtype, double_quant=double_quant),
        )
    return _last[1]


def _fingerprint(config: Mapping[str, Any]) -> str:
    return json.dumps(dict(config), sort_keys=True, default=str)


def load_config(resolved: ResolvedModel) -> Any:
    """The transformers config object of ``resolved``.

    :raises UsageError: a ``model_type`` that transformers does not know, or values it refuses.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    # A copy: transformers pops and rewrites nested parts.
    values = json.loads(json.dumps(dict(resolved.config_dict), default=_plain))
    # Which quantisation is used is the tier's matter.
    values.pop("quantization_config", None)
    model_type = values.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise UsageError(
            f"{OPTION}: {resolved.name!r} has the model_type {model_type!r}, which transformers "
            f"{version('transformers')} does not know; upgrade transformers or choose another model"
        )
    try:
        return CONFIG_MAPPING[model_type].from_dict(values)
    except Exception as error:  # each config class checks its values in its own way
        raise UsageError(
            f"{OPTION}: transformers {version('transformers')} refuses the config.json of "
            f"{resolved.name!r}: {one_line(error)}; correct the value"
        ) from error


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else str(value)


def one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"


def class_and_config(resolved: ResolvedModel) -> tuple[Any, Any]:
    """The causal LM's class, and its config object. Imports transformers and the model's own code.

    :raises UsageError: transformers knows no such model, or it generates no text.
    """
    with uncollected():
        config = load_config(resolved)
        return _causal_lm_class(resolved, config), config


def _causal_lm_class(resolved: ResolvedModel, config: Any) -> Any:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    try:
        found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError:
        raise UsageError(
            f"{OPTION}: {resolved.name!r} ({config.model_type}) is not a causal language model "
            f"in transformers {version('transformers')}; choose one that generates text"
        ) from None
    if isinstance(found, (list, tuple)):
        by_name = {cls.__name__: cls for cls in found}
        wanted = [name for name in config.architectures or () if name in by_name]
        return by_name[wanted[0]] if wanted else found[0]
    return found


def _quantizer(tier: Tier, dtype: Any, double_quant: bool) -> Any:
    if tier not in ("4bit", "8bit"):
        return None
    import_bitsandbytes()
    from transformers.utils.quantization_config import BitsAndBytesConfig

    if tier == "8bit":
        from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

        return Bnb8BitHfQuantizer(BitsAndBytesConfig(load_in_8bit=True), pre_quantized=False)
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=double_quant,
    )
    return Bnb4BitHfQuantizer(config, pre_quantized=False)


def new_meta_model(
    resolved: ResolvedModel, *, tier: Tier, dtype: str, double_quant: bool = False
) -> MetaModel:
    """As :func:`build_meta_model`, but the caller's own to change."""
    if dtype not in DTYPE_BYTES:
        raise UsageError(f"{dtype!r} is not a dtype to load in; known: {', '.join(DTYPE_BYTES)}")
    cls, config = class_and_config(resolved)
    import torch
    from transformers.utils.generic import ContextManagers

    torch_dtype = getattr(torch, dtype)
    quantizer = _quantizer(tier, torch_dtype, double_quant)
    # The same contexts and order as from_pretrained: the planner must see what it sees there.
    contexts = cls.get_init_context(torch_dtype, quantizer is not None, False, None)
    try:
        with ContextManagers(contexts):
            model = cls(config)
            if quantizer is not None:
                quantizer.preprocess_model(
                    model=model, dtype=torch_dtype, device_map="auto", checkpoint_files=None
                )
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        ZeroDivisionError,
        RuntimeError,  # torch's, of a negative size
        AssertionError,  # torch's, of a padding token beyond the vocabulary
    ) as error:
        raise UsageError(
            f"{OPTION}: transformers {version('transformers')} cannot build {cls.__name__} from "
            f"the config.json of {resolved.name!r}: {one_line(error)}; correct the value"
        ) from error
    return MetaModel(model=model, quantizer=quantizer, config=config)


def decoder_layers(model: Any) -> list[Any]:
    """The longest ModuleList of the text decoder: its layers, in order."""
    import torch

    lists = [
        module for module in decoder_of(model).modules() if isinstance(module, torch.nn.ModuleList)
    ]
    # Outer lists come first in modules(); a layer's own list of experts may be longer.
    return list(lists[0]) if lists else []
