"""The replayed pass against a real one: transformers' Llama on the CPU, every storage counted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from live_bytes import peak_bytes

from pytest_multigpu.model.kv import cache_argument
from pytest_multigpu.planning.allocator import Allocator, Held
from pytest_multigpu.planning.costs import HOPPER
from pytest_multigpu.planning.forward import Forward, Gpu
from pytest_multigpu.records.plan import Architecture

TOKENS = 1024
SHAPE = {"hidden": 512, "intermediate": 1792, "heads": 4, "kv_heads": 1, "vocab": 1000}


class Counted(Allocator):
    """Counts what tensors ask for: at this size the ends of blocks would count for much."""

    def take(self, size: int) -> Held:
        self.allocated += size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return Held(0, size, small=False)

    def drop(self, block: Held) -> None:
        self.allocated -= block.size


def real_peak(layers: int, batch: int) -> int:
    """A prompt's pass; several sequences are of unequal lengths."""
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
    return peak_bytes(
        model,
        # generate gives each sequence its own positions.
        lambda: model(
            ids,
            attention_mask=mask,
            position_ids=torch.arange(TOKENS).repeat(batch, 1),
            use_cache=True,
            logits_to_keep=1,
            **{cache_argument(model): DynamicCache(config=config)},
        ),
    )


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
    assert gpu.allocator.peak_allocated == pytest.approx(real_peak(layers, batch), rel=0.005)
