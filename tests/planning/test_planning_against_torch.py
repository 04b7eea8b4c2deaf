"""The replayed pass against a real one: transformers' Llama on the CPU, every storage counted."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest

from pytest_multigpu.planning.allocator import Allocator
from pytest_multigpu.planning.costs import HOPPER
from pytest_multigpu.planning.forward import Forward, Gpu
from pytest_multigpu.records.plan import Architecture

TOKENS = 1024
SHAPE = {"hidden": 512, "intermediate": 1792, "heads": 4, "kv_heads": 1, "vocab": 1000}


def real_peak(layers: int, batch: int) -> int:
    """Bytes of tensors alive at the worst moment of a prompt's pass, weights not counted."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=SHAPE["hidden"],
        intermediate_size=SHAPE["intermediate"],
        num_hidden_layers=layers,
        num_attention_heads=SHAPE["heads"],
        num_key_value_heads=SHAPE["kv_heads"],
        head_dim=128,
        vocab_size=SHAPE["vocab"],
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    known = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}
    alive: dict[int, int] = {}
    peak = 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal peak
            result = func(*args, **(kwargs or {}))
            for tensor in tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    storage = tensor.untyped_storage()
                    key = storage._cdata
                    if key not in alive and key not in known:
                        alive[key] = storage.nbytes()
                        weakref.finalize(storage, alive.pop, key, None)
            peak = max(peak, sum(alive.values()))
            return result

    ids = torch.randint(0, SHAPE["vocab"], (batch, TOKENS))
    with torch.no_grad(), Count():  # type: ignore[no-untyped-call]
        # generate gives each sequence its own positions.
        model(
            ids,
            position_ids=torch.arange(TOKENS).repeat(batch, 1),
            past_key_values=DynamicCache(config=config),
            use_cache=True,
            logits_to_keep=1,
        )
    return peak


@pytest.mark.parametrize(("layers", "batch"), [(1, 1), (3, 1), (3, 2)])
def test_a_prompt_takes_what_the_replay_says(
    layers: int, batch: int, make_llama: Callable[..., Architecture]
) -> None:
    model = make_llama("16bit", layers=layers, **SHAPE)
    gpu = Gpu(allocator=Allocator(), costs=HOPPER)
    Forward(model, logits_rows=1).run(
        [(block, gpu) for block in model.blocks], tokens=TOKENS, batch=batch, total_tokens=TOKENS
    )
    # Token and position ids, 8 bytes each, are too small for a plan to count.
    assert gpu.allocator.peak_allocated == pytest.approx(real_peak(layers, batch), rel=0.005)
