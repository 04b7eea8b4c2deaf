"""bitsandbytes as transformers uses it, with the weights already on their GPU.

transformers' own 8-bit operation sends each weight to the CPU and back; :class:`QuantiseInPlace`
runs the same kernel on the same values where they are. 4-bit goes through transformers' own
operation, which has no such detour. May import siblings; torch and bitsandbytes in functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .bitsandbytes_import import import_bitsandbytes

FOUR_BIT_BLOCK = 64
"""Weights per absmax; bitsandbytes' default, which transformers doesn't change."""


def quantization_config(tier: str, dtype: Any) -> Any:
    """``BitsAndBytesConfig`` of a tier: nf4 without double quantisation, or LLM.int8; else None.

    :param dtype: ``torch.dtype`` of activations: what 4-bit weights are expanded to.
    :raises LoadError: bitsandbytes cannot be imported.
    """
    if tier not in ("4bit", "8bit"):
        return None
    import_bitsandbytes()
    from transformers import BitsAndBytesConfig

    if tier == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )


def is_bitsandbytes(quantizer: Any) -> bool:
    """Whether this is one of the two quantisers that :class:`QuantiseInPlace` knows."""
    return type(quantizer).__name__ in ("Bnb4BitHfQuantizer", "Bnb8BitHfQuantizer")


def stored_bytes(quantizer: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes of the tensors that a quantised ``(out, in)`` weight becomes: data and statistics."""
    numel = 1
    for size in shape:
        numel *= size
    if type(quantizer).__name__ == "Bnb8BitHfQuantizer":
        return numel, 4 * shape[0]
    blocks = -(-numel // FOUR_BIT_BLOCK)
    return (numel + 1) // 2, 4 * blocks


def quantise_int8(weight: Any, parameter: Any, half: Any = None) -> Any:
    """``Int8Params`` of a float ``(out, in)`` weight, quantised on the weight's own device.

    What ``Int8Params._quantize`` does after its trip to the CPU: round to float16, then
    ``int8_vectorwise_quant``. ``half`` is a float16 tensor of that shape to round into.
    """
    import bitsandbytes as bnb
    import torch

    settings = dict(parameter.__dict__)
    settings.pop("SCB", None)
    settings.pop("CB", None)
    if settings.get("has_fp16_weights"):
        return bnb.nn.Int8Params(weight, requires_grad=False, **settings)
    if half is None:
        half = weight.contiguous().to(torch.float16)
    else:
        half.copy_(weight)
    data, scales, _ = bnb.functional.int8_vectorwise_quant(half)
    return bnb.nn.Int8Params(data, requires_grad=False, CB=data, SCB=scales, **settings)


class QuantiseInPlace:
    """Stands in for transformers' quantise operation during one load.

    :param done: called with the parameter's name once its 16-bit tensor may be overwritten.
    :param failed: called with the exception, which transformers itself would only log.
    :param half: gives the float16 scratch for a weight, or None.
    """

    def __init__(
        self,
        quantizer: Any,
        *,
        done: Callable[[str], None],
        failed: Callable[[BaseException], None],
        half: Callable[[Any], Any],
    ) -> None:
        self._stock = type(quantizer).get_quantize_ops(quantizer)
        self._int8 = type(quantizer).__name__ == "Bnb8BitHfQuantizer"
        self._done, self._failed, self._half = done, failed, half

    def convert(self, input_dict: Any, **kwargs: Any) -> Any:
        """As ``ConversionOps.convert``: parameter names to tensors, in and out."""
        try:
            if not self._int8:
                result = self._stock.convert(input_dict, **kwargs)
            else:
                result = {
                    name: self._convert_int8(name, value, kwargs["model"])
                    for name, value in input_dict.items()
                }
        except BaseException as error:
            self._failed(error)
            raise
        for name in result:
            self._done(name)
        return result

    def _convert_int8(self, name: str, value: Any, model: Any) -> Any:
        weight = value[0] if isinstance(value, list) else value
        module = model.get_submodule(name.rpartition(".")[0])
        if module.source_cls.__name__ == "Conv1D":
            return quantise_int8(weight.T, model.get_parameter_or_buffer(name))
        return quantise_int8(weight, model.get_parameter_or_buffer(name), self._half(weight))
