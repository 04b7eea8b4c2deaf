"""Importing bitsandbytes, quietly and without torch's compiler.

bitsandbytes 0.50 decorates what it runs on devices of no backend with ``torch.compile``, and that
imports torch's whole inductor, which took 4.7 s on a rented pod, for functions that no GPU calls.

LLM.int8 casts bf16 inputs to fp16 and logs so in every product: 560 lines a token of a 70B, which
would bury what a failing test has to say. It is logged once.
Imports errors; torch and bitsandbytes in functions.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import LoadError

_PRODUCTS = "bitsandbytes.autograd._functions"


def import_bitsandbytes() -> None:
    """Import it, once.

    :raises LoadError: it is not there, or built for another CUDA.
    """
    products = logging.getLogger(_PRODUCTS)
    if products.level == logging.NOTSET:  # nobody has chosen what to hear of it
        products.addFilter(_last_warning)
    if sys.modules.get("bitsandbytes") is not None:
        return
    chatter = logging.getLogger("bitsandbytes")
    level = chatter.level
    chatter.setLevel(logging.ERROR)  # it warns about CPU kernels, which nothing here uses
    try:
        with compiling_when_called():
            import bitsandbytes  # noqa: F401
    except Exception as error:  # a library built for another CUDA fails in many ways
        told = " ".join(str(error).split())
        raise LoadError(
            f"bitsandbytes cannot be imported ({type(error).__name__}: {told[:200]}); "
            f"reinstall it, or choose --gpu-tier=16bit"
        ) from error
    finally:
        chatter.setLevel(level)


def _last_warning(record: logging.LogRecord) -> bool:
    """Lets a record through and has its logger make no more warnings."""
    logging.getLogger(record.name).setLevel(logging.ERROR)
    return True


@contextmanager
def compiling_when_called() -> Iterator[None]:
    """Functions given to ``torch.compile`` meanwhile are given to it when they are first called."""
    import torch

    module: Any = torch
    compile_now = module.compile

    def compile_later(model: Any = None, **options: Any) -> Any:
        if model is None:
            return lambda function: compile_later(function, **options)
        if isinstance(model, torch.nn.Module):
            return compile_now(model, **options)
        compiled: list[Callable[..., Any]] = []

        @functools.wraps(model)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not compiled:
                compiled.append(compile_now(model, **options))
            return compiled[0](*args, **kwargs)

        return call

    module.compile = compile_later
    try:
        yield
    finally:
        module.compile = compile_now
