"""The replayed pass against a real one, transformers' Llama on the CPU: bytes and their order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from live_bytes import peak_bytes

from pytest_multigpu.model.kv import cache_argument
from pytest_multigpu.planning.allocator import Allocator, Held
from pytest_multigpu.planning.costs import HOPPER
from pytest_multigpu.planning.forward import Forward, Gpu
from pytest_multigpu.records.plan import Architecture
from pytest_multigpu.units import MIB

TOKENS = 1280
SHAPE = {"hidden": 512, "intermediate": 1792, "heads": 4, "kv_heads": 2, "vocab": 1000}


class Counted(Allocator):
    """Counts what tensors ask for: at this size the ends of blocks would count for much."""

    def take(self, size: int) -> Held:
        self.allocated += size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return Held(0, size, small=False)

    def drop(self, block: Held) -> None:
        self.allocated -= block.size


def real_pass(layers: int, batch: int) -> tuple[Any, Callable[[], object]]:
    """A model and a prompt's pass; several sequences are of unequal lengths."""
    import torch
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
    ids = torch.randint(0, SHAPE["vocab"], (batch, TOKENS))
    mask = torch.ones_like(ids)
    mask[1:, :7] = 0
    return model, lambda: model(
        ids,
        attention_mask=mask,
        # generate gives each sequence its own.
        position_ids=torch.arange(TOKENS).repeat(batch, 1),
        use_cache=True,
        logits_to_keep=1,
        **{cache_argument(model): DynamicCache(config=config)},
    )


def real_sizes(run: Callable[[], object]) -> list[int]:
    """Bytes of every large tensor taken (above 0) and released (below), in their order."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with torch.no_grad():
        run()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            run()
    events = profiled.profiler.kineto_results.events()
    return [int(one.nbytes()) for one in events if one.name() == "[memory]"]


@pytest.mark.parametrize(("layers", "batch"), [(1, 1), (3, 1), (3, 2)])
def test_a_prompt_takes_what_the_replay_says(
    layers: int, batch: int, make_llama: Callable[..., Architecture]
) -> None:
    model = make_llama("16bit", layers=layers, **SHAPE)
    gpu = Gpu(allocator=Counted(), costs=HOPPER)
    Forward(model, logits_rows=1).run(
        [(block, gpu) for block in model.blocks], tokens=TOKENS, batch=batch, total_tokens=TOKENS
    )
    # Token and position ids, 8 bytes each, are too small for a plan to count.
    assert gpu.allocator.peak_allocated == pytest.approx(
        peak_bytes(*real_pass(layers, batch)), rel=0.005
    )


@pytest.mark.parametrize("batch", [1, 2])
def test_in_the_order_in_which_the_replay_says(
    batch: int, make_llama: Callable[..., Architecture]
) -> None:
    """What is reused, and so what is held beside it, follows from the order: gigabytes of it."""
    taken: list[int] = []

    class Logged(Counted):
        def take(self, size: int) -> Held:
            taken.append(size)
            return super().take(size)

        def drop(self, block: Held) -> None:
            taken.append(-block.size)
            super().drop(block)

    model = make_llama("16bit", layers=3, **SHAPE)
    gpu = Gpu(allocator=Logged(), costs=HOPPER)
    Forward(model, logits_rows=1).run(
        [(block, gpu) for block in model.blocks], tokens=TOKENS, batch=batch, total_tokens=TOKENS
    )
    # What the CPU's own kernels take for themselves is no GPU's; small tensors are in neither.
    sizes = {abs(size) for size in taken if abs(size) >= MIB // 8}
    ours = [size for size in taken if abs(size) in sizes]
    real = [size for size in real_sizes(real_pass(3, batch)[1]) if abs(size) in sizes]
    # After the last one is taken all goes, in an order that nothing rests on.
    last = max(at for at, size in enumerate(ours) if size > 0)
    assert real[: last + 1] == ours[: last + 1]
