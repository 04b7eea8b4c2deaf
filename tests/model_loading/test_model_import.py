"""What loading a model takes is imported ahead of it, without a CUDA context."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
from pytest_multigpu.model.config import resolve_config
from pytest_multigpu.model.loading import import_all, load_model
import_all(resolve_config("tiny-llama"))
import torch
assert not torch.cuda.is_initialized()
before = set(sys.modules)
load_model("tiny-llama", tier="cpu", device_map={"": "cpu"}, weights="synthetic")
heavy = ("transformers.generation.utils", "transformers.models.llama.modeling_llama", "accelerate")
print(sorted(name for name in set(sys.modules) - before if name in heavy))
"""


def test_loading_imports_no_more_of_what_is_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
