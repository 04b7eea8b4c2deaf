"""Up to how many tokens bitsandbytes multiplies nf4 weights as they are, on Hopper.

Above, it first dequantises the whole Linear to 16 bit. Follows ``_gemm_4bit_use_custom_cuda`` of
bitsandbytes 0.50 (``backends/cuda/ops.py``) for compute capability 9.0; a test compares with the
installed one. Imports nothing.
"""

from __future__ import annotations

PROCESSORS = 132
"""Streaming multiprocessors of an H100 SXM and of an H200."""
ROWS_A_BLOCK = 64
SMALL = 4 * 1024 * 1024
"""Weights below which dequantising is mostly overhead."""


def direct_tokens(rows: int, columns: int) -> int:
    """Tokens x sequences up to which a weight of that shape is not dequantised."""
    blocks = -(-rows // ROWS_A_BLOCK)
    if rows * columns < SMALL:
        return _direct_if_small(rows, columns, blocks)
    if blocks >= PROCESSORS:
        return 64 if blocks >= 3 * PROCESSORS else 48 if blocks >= 2 * PROCESSORS else 32
    three_quarters = 4 * blocks >= 3 * PROCESSORS
    if blocks >= PROCESSORS // 2 and (columns < rows or three_quarters):
        return 16
    # Six and seven tokens are dequantised for few rows and many columns.
    tall = columns > rows and not three_quarters
    square = columns == rows and not three_quarters and 5 * blocks >= 3 * PROCESSORS
    return 5 if blocks >= 36 and (tall or square) else 7


def _direct_if_small(rows: int, columns: int, blocks: int) -> int:
    if 2 * columns < rows:
        return 512 if 3 * blocks < PROCESSORS else 320
    if 4 * blocks <= PROCESSORS:
        return 32
    return 16 if 2 * blocks <= PROCESSORS else 4
