"""Cached memory goes back only once no GPU computes with it any more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pytest_multigpu.errors import LoadError
from pytest_multigpu.model import filling, torch_caches
from pytest_multigpu.model.loading import load_model
from pytest_multigpu.model.matching import Target
from pytest_multigpu.units import GIB


class Cuda:
    """``torch.cuda`` of a process that has memory on some of its GPUs."""

    def __init__(self, *reserved: int, ready: bool = True) -> None:
        self.reserved, self.ready = reserved, ready
        self.calls: list[str] = []

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return self.ready

    def device_count(self) -> int:
        return len(self.reserved)

    def memory_reserved(self, index: int) -> int:
        return self.reserved[index]

    def synchronize(self, index: int) -> None:
        self.calls.append(f"wait for {index}")

    def empty_cache(self) -> None:
        self.calls.append("empty")


@pytest.mark.parametrize(
    ("cuda", "calls"),
    [
        (Cuda(5, 0, 7), ["wait for 0", "wait for 2", "empty"]),
        (Cuda(0, 0), []),
        (Cuda(5, ready=False), []),
    ],
)
def test_every_gpu_in_use_is_waited_for(
    cuda: Cuda, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_caches, "_cuda", lambda: cuda)
    torch_caches.give_back_cached()
    assert cuda.calls == calls


def test_nowhere_else_is_a_cache_emptied() -> None:
    """Everybody goes through the one that waits."""
    package = Path(torch_caches.__file__).parents[1]
    found = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if "cuda.empty_cache()" in path.read_text() and "planning" not in path.parts
    }
    assert found == {"model/torch_caches.py"}


@pytest.mark.parametrize("weights", ["synthetic", "checkpoint"])
def test_a_load_waits_before_transformers_goes_on(
    weights: Any, tiny: Any, written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which hands the model to accelerate, and that empties the caches for some tensors."""
    model = tiny if weights == "synthetic" else str(written)
    waited: list[bool] = []
    monkeypatch.setattr(filling, "wait_for_devices", lambda: waited.append(True))
    load_model(model, tier="16bit", device_map={"": "cpu"}, weights=weights)
    assert waited == [True]


@pytest.mark.parametrize(
    ("settings", "pieces"),
    [("", [3 * GIB]), ("expandable_segments:True", [3 * GIB]), ("max_split_size_mb:128", [])],
)
def test_one_piece_for_all_weights_only_if_it_is_dealt_out(
    settings: str, pieces: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A 40 GB piece that is never cut lay beside an nf4 70B until an H100 was full."""
    asked: list[int] = []
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", settings)
    monkeypatch.setattr(filling, "give_back_cached", lambda: None)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _device: (8 * GIB, 8 * GIB))
    monkeypatch.setattr("torch.empty", lambda size, **_: asked.append(size))
    weight = Target(
        name="w",
        device=torch.device("cuda", 0),
        dtype=torch.bfloat16,
        shape=(3 * GIB // 2,),
        quantised=False,
    )
    filling._reserve([weight], None)
    assert asked == pieces
    with pytest.raises(LoadError, match=r"^GPU 0: out of memory: its weights take 12\.0 GiB, 8\.0"):
        filling._reserve([weight] * 4, None)
