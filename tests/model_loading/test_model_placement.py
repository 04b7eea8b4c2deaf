from __future__ import annotations

from typing import Any

import pytest

from pytest_multigpu.model.config import ResolvedModel
from pytest_multigpu.model.loading import load_model
from pytest_multigpu.model.placement import observe
from pytest_multigpu.records.plan import Tier

CPU = {"": "cpu"}
LAYERS_BUFFERS = 128  # inv_freq: fp32, 16 values, kept twice


@pytest.mark.parametrize("tier", ["16bit", "8bit", "4bit"])
def test_bytes_and_parameters_equal_the_architectures(tiny: ResolvedModel, tier: Tier) -> None:
    loaded = load_model(tiny, tier=tier, device_map=CPU)
    (device,) = loaded.placement.devices
    assert (device.device, device.layers) == ("cpu", (0, 1, 2))
    assert device.parameters == loaded.architecture.parameters
    assert device.weights_bytes == loaded.architecture.weights_bytes + LAYERS_BUFFERS


def test_int8_statistics_are_counted_after_the_first_forward_too(tiny: ResolvedModel) -> None:
    import torch

    loaded = load_model(tiny, tier="8bit", device_map=CPU)
    with torch.no_grad():
        loaded.model(torch.arange(3, 9)[None])
    assert observe(loaded.model) == loaded.placement


def test_a_loose_buffer_has_no_place_in_the_map() -> None:
    """GPT-BigCode's mask: transformers' own maps have none for it either."""
    config = {
        "model_type": "gpt_bigcode",
        "vocab_size": 300,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
    }
    loaded = load_model(ResolvedModel(name="x", config_dict=config), tier="16bit", device_map=CPU)
    planned = {block.name for block in loaded.architecture.blocks}
    assert set(loaded.placement.device_map) == planned
    (device,) = loaded.placement.devices
    assert device.weights_bytes == loaded.architecture.weights_bytes + 64 * 64


def test_one_entry_a_block_and_one_a_module_where_a_block_is_split(tiny: ResolvedModel) -> None:
    import torch

    loaded = load_model(tiny, tier="16bit", device_map=CPU)
    whole = observe(loaded.model)
    assert whole.device_map == {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "cpu",
        "model.layers.2": "cpu",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    mlp: Any = loaded.model.model.layers[1].mlp
    mlp.to(torch.device("meta"))
    split = observe(loaded.model)
    assert [device.device for device in split.devices] == ["cpu", "meta"]
    assert split.device_map["model.layers.1.mlp.up_proj"] == "meta"
    assert split.device_map["model.layers.1.self_attn.q_proj"] == "cpu"
    assert "model.layers.1" not in split.device_map
    assert [device.layers for device in split.devices] == [(0, 1, 2), (1,)]
    assert split.parameters == whole.parameters
