from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pytest_multigpu.errors import LoadError, UsageError
from pytest_multigpu.model import architecture
from pytest_multigpu.model.architecture import describe
from pytest_multigpu.model.config import ResolvedModel, preset_config
from pytest_multigpu.model.meta import build_meta_model
from pytest_multigpu.presets import PRESETS
from pytest_multigpu.records.plan import Tier

SEVENTY = preset_config("llama-3.3-70b")


@pytest.mark.parametrize(
    ("tier", "double_quant", "total"),
    [
        ("16bit", False, 141_107_412_992),
        ("8bit", False, 72_683_241_472),
        ("4bit", False, 42_709_076_992),
        ("4bit", True, 39_517_721_792),
    ],
)
def test_llama_70b(tier: Tier, double_quant: bool, total: int) -> None:
    found = describe(SEVENTY, tier=tier, double_quant=double_quant)
    assert found.weights_bytes == total
    assert found.parameters == 70_553_706_496
    assert found.unknown == ()


def test_llama_70b_block_by_block() -> None:
    found = describe(SEVENTY, tier="16bit")
    names = [block.name for block in found.blocks]
    assert names == [
        "model.embed_tokens",
        *(f"model.layers.{index}" for index in range(80)),
        "model.norm",
        "model.rotary_emb",
        "lm_head",
    ]
    embedding, first, *_, norm, rotary, head = found.blocks
    assert (embedding.kind, embedding.weights_bytes) == ("embedding", 2_101_346_304)
    assert (first.kind, first.layer, first.weights_bytes) == ("layer", 0, 1_711_308_800)
    assert (norm.kind, norm.weights_bytes) == ("norm", 2 * 8192)
    assert (rotary.kind, rotary.parameters, rotary.weights_bytes) == ("other", 0, 0)
    assert (head.kind, head.weights_bytes, head.tied_to) == ("head", 2_101_346_304, None)
    assert {block.kv_bytes_per_token for block in found.blocks} == {0, 4096}
    assert sum(block.kv_bytes_per_token for block in found.blocks) == 327_680
    assert (found.layers, found.heads, found.kv_heads, found.head_dim) == (80, 64, 8, 128)
    assert (found.hidden_size, found.intermediate_size) == (8192, 28672)
    assert (found.vocab_size, found.max_context) == (128_256, 131_072)
    assert (found.model_class, found.dtype) == ("LlamaForCausalLM", "bfloat16")


def test_what_is_quantised_while_loading() -> None:
    plain, quantised = (describe(SEVENTY, tier=tier) for tier in ("16bit", "4bit"))
    assert {block.load_transient_bytes for block in plain.blocks} == {0}
    by_name = {block.name: block.load_transient_bytes for block in quantised.blocks}
    assert by_name["model.layers.0"] == 28672 * 8192 * 2
    assert by_name["model.embed_tokens"] == by_name["lm_head"] == 0


def test_the_dtype_counts() -> None:
    half, full = (
        describe(preset_config("tiny-llama"), tier="cpu", dtype=dtype)
        for dtype in ("float16", "float32")
    )
    assert full.weights_bytes == 2 * half.weights_bytes == 4 * full.parameters
    assert full.blocks[1].kv_bytes_per_token == 2 * half.blocks[1].kv_bytes_per_token
    assert full.blocks[1].kv_bytes_per_token == 2 * 2 * 16 * 4


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-3.1-70b", 70.553706496),
        ("llama-3.1-8b", 8.030261248),
        ("llama-3.2-3b", 3.212749824),
        ("llama-3.2-1b", 1.235814400),
        ("qwen2.5-72b", 72.706203648),
        ("qwen2.5-7b", 7.615616512),
        ("mistral-7b", 7.248023552),
        ("mixtral-8x7b", 46.702792704),
    ],
)
def test_presets_have_the_published_size(name: str, billions: float) -> None:
    found = describe(preset_config(name), tier="16bit")
    assert found.parameters == round(billions * 10**9)
    assert found.unknown == ()


def quantised_nbytes(model: Any) -> int:
    """Bytes of everything that belongs to the weights of a loaded bitsandbytes model."""
    total = 0
    for parameter in model.parameters():
        total += parameter.nbytes
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            total += state.absmax.nbytes + state.code.nbytes
            if state.nested:
                total += state.state2.absmax.nbytes + state.state2.code.nbytes
                total += state.offset.nbytes
        statistics = getattr(parameter, "SCB", None)
        total += 0 if statistics is None else statistics.nbytes
    return total


ODD = {
    "model_type": "llama",
    "hidden_size": 40,
    "head_dim": 10,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}
"""Sizes that divide by neither 64 nor 256: every statistic is rounded up somewhere."""


@pytest.mark.parametrize(
    ("tier", "double_quant"), [("16bit", False), ("8bit", False), ("4bit", False), ("4bit", True)]
)
def test_what_bitsandbytes_really_holds(tier: Tier, double_quant: bool) -> None:
    torch = pytest.importorskip("torch")
    from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    settings = {
        "16bit": None,
        "8bit": BitsAndBytesConfig(load_in_8bit=True),
        "4bit": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_use_double_quant=double_quant,
        ),
    }[tier]
    config = LlamaConfig.from_dict(dict(ODD))
    weights = LlamaForCausalLM(config).to(torch.bfloat16).state_dict()
    loaded = LlamaForCausalLM.from_pretrained(
        None,
        config=config,
        state_dict=weights,
        dtype=torch.bfloat16,
        device_map={"": "cpu"},
        quantization_config=settings,
    )
    resolved = ResolvedModel(name="odd", config_dict=ODD)
    found = describe(resolved, tier=tier, double_quant=double_quant)
    assert found.weights_bytes == quantised_nbytes(loaded)


def test_a_quantised_checkpoint_is_said_so() -> None:
    config = {**PRESETS["tiny-llama"], "quantization_config": {"quant_method": "gptq"}}
    found = describe(ResolvedModel(name="x", config_dict=config), tier="16bit")
    assert found.unknown == (
        "the checkpoint is quantised already; the plan counts it as quantised by bitsandbytes "
        "while loading, or in 16 bit",
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "nonesuch"},
            r"--gpu-model: 'x' has the model_type 'nonesuch', which transformers [\d.]+ does not "
            r"know; upgrade transformers or choose another model",
        ),
        (
            {"model_type": "vit"},
            r"--gpu-model: 'x' \(vit\) is not a causal language model in transformers [\d.]+; "
            r"choose one that generates text",
        ),
        (
            {"hidden_act": "nonesuch"},
            r"--gpu-model: transformers [\d.]+ cannot build LlamaForCausalLM from the config.json "
            r"of 'x': KeyError: .*nonesuch.*; correct the value",
        ),
        (
            {"pad_token_id": 512},
            r"--gpu-model: transformers [\d.]+ cannot build LlamaForCausalLM from the config.json "
            r"of 'x': AssertionError: Padding_idx must be within num_embeddings; correct the value",
        ),
        (
            {"intermediate_size": -4},
            r"--gpu-model: transformers [\d.]+ cannot build LlamaForCausalLM from the config.json "
            r"of 'x': RuntimeError: .*negative dimension -4.*; correct the value",
        ),
        (
            {"hidden_size": "wide"},
            r"--gpu-model: transformers [\d.]+ refuses the config.json of 'x': .*; correct the "
            r"value",
        ),
    ],
)
def test_a_configuration_that_cannot_be_built(change: dict[str, object], message: str) -> None:
    config = {**PRESETS["tiny-llama"], **change}
    with pytest.raises(UsageError, match=f"^{message}$"):
        describe(ResolvedModel(name="x", config_dict=config), tier="16bit")


def test_a_model_that_cannot_be_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """BLT's configuration has no layers."""

    def fail(*_: object, **__: object) -> None:
        raise AttributeError("'BltConfig' object has no attribute 'num_hidden_layers'")

    monkeypatch.setattr("pytest_multigpu.model.architecture.read_kv_layout", fail)
    with pytest.raises(UsageError) as caught:
        describe(preset_config("tiny-llama"), tier="16bit", use_cache=False)
    assert str(caught.value) == (
        "--gpu-model: 'tiny-llama' is a LlamaForCausalLM, whose memory cannot be planned: "
        "AttributeError: 'BltConfig' object has no attribute 'num_hidden_layers'; choose a "
        "language model of plain decoder layers"
    )


@pytest.mark.parametrize("error", [AttributeError, NotImplementedError])
@pytest.mark.parametrize("asked", ["get_input_embeddings", "get_output_embeddings"])
def test_embeddings_that_cannot_be_told_are_not_planned_as_something_else(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception], asked: str
) -> None:
    from transformers import LlamaForCausalLM

    def fail(_: object) -> None:
        raise error("it has none of the usual names")

    monkeypatch.setattr(LlamaForCausalLM, asked, fail)
    with pytest.raises(UsageError, match="it has none of the usual names"):
        describe(preset_config("tiny-llama"), tier="16bit", use_cache=False)


def test_a_broken_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(LoadError) as caught:
        describe(preset_config("tiny-llama"), tier="8bit")
    assert str(caught.value) == (
        "bitsandbytes cannot be imported (ModuleNotFoundError: import of bitsandbytes halted; "
        "None in sys.modules); reinstall it, or choose --gpu-tier=16bit"
    )


def test_one_model_is_built_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads share torch's default dtype."""
    building, most = [0], [0]

    def build(*args: Any, **kwargs: Any) -> Any:
        building[0] += 1
        most[0] = max(most[0], building[0])
        try:
            time.sleep(0.05)
            return build_meta_model(*args, **kwargs)
        finally:
            building[0] -= 1

    monkeypatch.setattr(architecture, "build_meta_model", build)
    resolved = preset_config("tiny-llama")
    with ThreadPoolExecutor(4) as pool:
        found = list(
            pool.map(lambda _: describe(resolved, tier="16bit", use_cache=False), range(4))
        )
    assert most == [1]
    assert all(one == found[0] for one in found)


def test_an_unknown_dtype() -> None:
    with pytest.raises(UsageError) as caught:
        describe(SEVENTY, tier="16bit", dtype="int8")
    assert str(caught.value) == (
        "'int8' is not a dtype to load in; known: bfloat16, float16, float32"
    )


@pytest.mark.parametrize(
    ("rope", "positions"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131_072),
        ({"type": "yarn", "factor": 4.0}, 131_072),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8192}, 32_768),
        # Llama 3.2 says 32 times 8192 and 131072 positions, and means the latter.
        (
            {
                "rope_type": "llama3",
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            32_768,
        ),
        (None, 32_768),
    ],
)
def test_positions_with_stretched_rotary_angles(rope: Any, positions: int) -> None:
    small = {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "rope_scaling": rope,
    }
    found = describe(ResolvedModel(name="small", config_dict=small), tier="16bit", use_cache=False)
    assert found.max_context == positions
