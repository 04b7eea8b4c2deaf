"""When nf4 weights are dequantised: as the installed bitsandbytes decides on an H100."""

from __future__ import annotations

import ast
import functools
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from pytest_multigpu.planning.costs import HOPPER, OTHER
from pytest_multigpu.planning.nf4 import PROCESSORS, direct_tokens

ROWS = (64, 512, 768, 1024, 2048, 2112, 2240, 2304, 3072, 4096, 4160, 5120, 6144, 6272, 6336, 8192,
        8448, 10240, 14336, 16896, 18432, 25344, 28672, 36864)  # fmt: skip
COLUMNS = (64, 256, 1024, 2048, 2880, 4096, 5120, 6144, 6336, 8192, 14336, 24576, 28672)
TOKENS = (*range(1, 70), 128, 319, 320, 321, 511, 512, 513, 1536)


@pytest.fixture
def uses_own_kernel() -> Any:
    """bitsandbytes' decision, told that the GPU is an H100. Its module needs a torch with CUDA, the
    function alone does not."""
    import torch

    spec = importlib.util.find_spec("bitsandbytes")
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).with_name("backends") / "cuda" / "ops.py"
    wanted = ("_gemm_4bit_use_custom_cuda", "_GEMM_4BIT_CUSTOM_FLOOR_M")
    found: dict[str, Any] = {
        "torch": torch,
        "functools": functools,
        "_gpu_dispatch_props": lambda _index: (PROCESSORS, 9, 0),
    }
    parts = [
        node
        for node in ast.parse(source.read_text()).body
        if getattr(node, "name", None) in wanted
        or (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in wanted)
    ]
    exec(compile(ast.Module(parts, []), str(source), "exec"), found)
    return found[wanted[0]]


def test_the_installed_bitsandbytes_agrees(uses_own_kernel: Any) -> None:
    import torch

    for rows in ROWS:
        for columns in COLUMNS:
            direct = [m for m in TOKENS if uses_own_kernel(0, torch.bfloat16, m, rows, columns)]
            assert max(direct) == direct_tokens(rows, columns), (rows, columns)
            assert direct == [m for m in TOKENS if m <= max(direct)]


@pytest.mark.parametrize(
    ("shape", "tokens"),
    [
        ((28672, 8192), 64),  # a 70B's gate and up
        ((8192, 28672), 16),  # its down
        ((1024, 8192), 7),  # its K and V
        ((4096, 14336), 5),  # an 8B's down
    ],
)
def test_well_known_shapes(shape: tuple[int, int], tokens: int) -> None:
    assert direct_tokens(*shape) == tokens
    assert not HOPPER.dequantises(tokens, *shape)
    assert HOPPER.dequantises(tokens + 1, *shape)


def test_other_gpus_have_one_limit() -> None:
    assert not OTHER.dequantises(16, 4096, 14336)
    assert OTHER.dequantises(17, 4096, 14336)
