"""The same seeded products on every GPU, and how fast products and memory are there.

Operands are integers of the uploaded random bytes scaled by a power of two: the same bits on
every GPU without any random generator. Imports torch inside functions only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .again import best_speeds
from .copies import checksum
from .emitter import Emitter

if TYPE_CHECKING:
    import torch

    from .backend import Backend

MATRIX_SIZE = 4096
SAMPLE = 32
"""Rows and columns of the sample that the CPU recomputes in float64, spread over the product."""
MIB = 1 << 20
MEMORY_BUFFER_BYTES = 512 * MIB
LEAST_MEMORY_BUFFER_BYTES = 256 * MIB
"""Smaller copies would measure the cache (126 MB on the largest cards) as well."""


_AGAIN = 0.9
"""Of the fastest GPU: a slower one is measured again before anybody judges it."""


def operands(
    words: torch.Tensor, dtype: str, size: int, step: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two matrices from the first words, the same bits on any device.

    :param words: (n,) int64.
    :param dtype: ``bfloat16``: bytes / 128, exact; ``float32``: 32-bit integers / 2**31.
    :param step: every ``step``-th row of the left and column of the right, for a sample.
    :returns: (size / step, size) and (size, size / step).
    """
    import torch

    integers = words.view(_integers(dtype))[: 2 * size * size].view(2, size, size)
    scale = 1 / 128 if dtype == "bfloat16" else 2.0**-31
    kind = getattr(torch, dtype)
    return integers[0, ::step].to(kind) * scale, integers[1, :, ::step].to(kind) * scale


def matrix_size(words: torch.Tensor, dtype: str, limit: int) -> int:
    """The largest size that the words suffice for, a multiple of 16, at most ``limit``."""
    numbers = words.numel() * words.element_size() // _integers(dtype).itemsize
    return min(limit, math.isqrt(numbers // 2) // 16 * 16)


def _integers(dtype: str) -> torch.dtype:
    import torch

    return torch.int8 if dtype == "bfloat16" else torch.int32


def sample_error(sample: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> float:
    """Largest error of a sample over the sample's largest true value; infinite if not finite.

    All on the CPU: ``left`` (rows, size), ``right`` (size, columns); the truth is float64.
    """
    import torch

    truth = left.to(torch.float64) @ right.to(torch.float64)
    error = (sample.to(torch.float64) - truth).abs().max() / truth.abs().max()
    return float(error) if bool(torch.isfinite(error)) else math.inf


def products(
    backend: Backend, emitter: Emitter, uploaded: dict[int, torch.Tensor], host: torch.Tensor
) -> None:
    """bf16 and fp32 (TF32 off) on all GPUs at once; the references from the host's words."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    for dtype, limit, bits in (
        ("bfloat16", MATRIX_SIZE, torch.int16),
        ("float32", MATRIX_SIZE // 2, torch.int32),
    ):
        size = matrix_size(host, dtype, limit)
        step = max(1, size // SAMPLE)

        def multiply(
            gpu: int,
            dtype: str = dtype,
            size: int = size,
            bits: torch.dtype = bits,
            step: int = step,
        ) -> tuple[int, torch.Tensor]:
            left, right = operands(uploaded[gpu], dtype, size)
            product = backend.matmul(left, right, gpu)
            return checksum(product.view(bits)), product[::step, ::step].cpu()

        found = emitter.each(sorted(uploaded), multiply)
        rows, columns = operands(host, dtype, size, step)
        for gpu, (total, sample) in zip(sorted(uploaded), found, strict=True):
            emitter.result(
                "product",
                gpu=gpu,
                dtype=dtype,
                size=size,
                checksum=total,
                relative_error=sample_error(sample, rows, columns),
            )


def load(
    backend: Backend, emitter: Emitter, uploaded: dict[int, torch.Tensor], seconds: float
) -> None:
    """bf16 products on all GPUs at once for about ``seconds``: clocks and throttling show."""

    def busy(gpu: int) -> float:
        size = matrix_size(uploaded[gpu], "bfloat16", MATRIX_SIZE)
        left, right = operands(uploaded[gpu], "bfloat16", size)
        operations = 2 * size**3

        def run(count: int) -> float:
            def work() -> None:
                for _ in range(count):
                    backend.matmul(left, right, gpu)

            return backend.seconds_of(gpu, work)

        once = run(8) / 8
        count = max(8, min(4000, int(seconds / once)))
        return operations * count / run(count) / 1e12

    def measure(gpus: Sequence[int]) -> list[float]:
        emitter.at(*gpus)
        return emitter.each(gpus, busy)

    best_speeds(
        sorted(uploaded),
        measure,
        lambda gpu, speed: emitter.result("load", gpu=gpu, tflop_per_s=speed),
        share=_AGAIN,
    )


def memory_speeds(
    backend: Backend, emitter: Emitter, gpus: Sequence[int], buffer_bytes: int | None = None
) -> None:
    """Copies within each GPU, all at once; bytes read plus bytes written."""
    import torch

    sizes = {
        gpu: buffer_bytes or min(MEMORY_BUFFER_BYTES, backend.free_bytes(gpu) // 3) for gpu in gpus
    }
    least = buffer_bytes or LEAST_MEMORY_BUFFER_BYTES
    for gpu in gpus:
        if sizes[gpu] < least:
            emitter.unmeasured(
                [gpu], f"less than {3 * LEAST_MEMORY_BUFFER_BYTES // MIB} MiB free on GPU {gpu}"
            )

    def copy(gpu: int) -> float:
        size = sizes[gpu]
        device = backend.device(gpu)
        source = torch.zeros(size, dtype=torch.uint8, device=device)
        out = torch.empty(size, dtype=torch.uint8, device=device)

        def work() -> None:
            backend.copy_within(out, source, gpu)

        return 2 * size / min(backend.seconds_of(gpu, work) for _ in range(4)) / 1e9

    def measure(some: Sequence[int]) -> list[float]:
        emitter.at(*some)
        return emitter.each(some, copy)

    best_speeds(
        [gpu for gpu in gpus if sizes[gpu] >= least],
        measure,
        lambda gpu, speed: emitter.result("memory speed", gpu=gpu, gb_per_s=speed),
        share=_AGAIN,
    )
