"""Tiny models for the loading tests: built once, written once."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pytest_multigpu.model.config import ResolvedModel

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="session", autouse=True)
def _libraries_are_no_garbage() -> Iterator[None]:
    """Import once and leave the libraries' million objects out of every later collection."""
    import bitsandbytes  # noqa: F401
    import torch  # noqa: F401
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def tiny() -> ResolvedModel:
    return ResolvedModel(name="tiny", config_dict=LLAMA)


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory, tiny: ResolvedModel) -> Path:
    """A sharded bfloat16 checkpoint with its tokenizer; not to be changed."""
    from pytest_multigpu.model.loaded import release
    from pytest_multigpu.model.loading import load_model

    folder = tmp_path_factory.mktemp("checkpoint")
    loaded = load_model(tiny, tier="16bit", device_map={"": "cpu"})
    loaded.model.save_pretrained(folder, max_shard_size="400KB")
    loaded.tokenizer.save_pretrained(folder)
    release(loaded)
    return folder


@pytest.fixture
def checkpoint(written: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    import shutil

    return Path(shutil.copytree(written, tmp_path / "model"))
