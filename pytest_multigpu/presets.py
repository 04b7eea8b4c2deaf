"""Architectures that need no hub: the configuration of well-known models, and of the built-in one.

The values are those of each model's published ``config.json``. Pure data; imports nothing of this
package and no heavy library.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

Config = Mapping[str, object]
"""A Hugging Face ``config.json`` as a mapping: ``model_type`` and the shape."""

BUILT_IN = "tiny-llama"
"""The cpu tier's model."""


def _llama3(
    *,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    head_dim: int = 128,
    kv_heads: int = 8,
    rope_factor: float = 8.0,
    tied: bool = False,
) -> Config:
    """What all of Llama 3.1, 3.2 and 3.3 (instruct) share."""
    return MappingProxyType(
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "vocab_size": 128256,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-05,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "initializer_range": 0.02,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": rope_factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            "bos_token_id": 128000,
            "eos_token_id": [128001, 128008, 128009],
            "tie_word_embeddings": tied,
            "torch_dtype": "bfloat16",
            "use_cache": True,
        }
    )


def _qwen25(
    *, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, window_layers: int
) -> Config:
    """Qwen2.5 (instruct), 7B and larger: untied, sliding window present but switched off."""
    return MappingProxyType(
        {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "vocab_size": 152064,
            "max_position_embeddings": 32768,
            "max_window_layers": window_layers,
            "sliding_window": 131072,
            "use_sliding_window": False,
            "rms_norm_eps": 1e-06,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "rope_theta": 1000000.0,
            "bos_token_id": 151643,
            "eos_token_id": [151645, 151643],
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_cache": True,
        }
    )


_LLAMA_70B = _llama3(hidden=8192, intermediate=28672, layers=80, heads=64)

_MISTRAL_SHAPE: Config = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "sliding_window": None,
    "rms_norm_eps": 1e-05,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rope_theta": 1000000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}

PRESETS: Mapping[str, Config] = MappingProxyType(
    {
        "llama-3.3-70b": _LLAMA_70B,
        "llama-3.1-70b": _LLAMA_70B,
        "llama-3.1-8b": _llama3(hidden=4096, intermediate=14336, layers=32, heads=32),
        "llama-3.2-3b": _llama3(
            hidden=3072, intermediate=8192, layers=28, heads=24, rope_factor=32.0, tied=True
        ),
        "llama-3.2-1b": _llama3(
            hidden=2048,
            intermediate=8192,
            layers=16,
            heads=32,
            head_dim=64,
            rope_factor=32.0,
            tied=True,
        ),
        "qwen2.5-72b": _qwen25(
            hidden=8192, intermediate=29568, layers=80, heads=64, kv_heads=8, window_layers=70
        ),
        "qwen2.5-7b": _qwen25(
            hidden=3584, intermediate=18944, layers=28, heads=28, kv_heads=4, window_layers=28
        ),
        "mistral-7b": MappingProxyType(
            {
                **_MISTRAL_SHAPE,
                "architectures": ["MistralForCausalLM"],
                "model_type": "mistral",
                "head_dim": 128,
                "vocab_size": 32768,
            }
        ),
        "mixtral-8x7b": MappingProxyType(
            {
                **_MISTRAL_SHAPE,
                "architectures": ["MixtralForCausalLM"],
                "model_type": "mixtral",
                "vocab_size": 32000,
                "num_local_experts": 8,
                "num_experts_per_tok": 2,
                "router_aux_loss_coef": 0.02,
                "output_router_logits": False,
            }
        ),
        # Big enough to have every part of a Llama (grouped heads, several layers), small enough to
        # run in milliseconds. 512 tokens: 256 bytes, the special ones, and room.
        BUILT_IN: MappingProxyType(
            {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 6,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "vocab_size": 512,
                "max_position_embeddings": 4096,
                "rms_norm_eps": 1e-05,
                "hidden_act": "silu",
                "attention_bias": False,
                "mlp_bias": False,
                "initializer_range": 0.02,
                "rope_theta": 10000.0,
                # The built-in tokenizer's: end of text and end of turn both stop.
                "bos_token_id": 256,
                "eos_token_id": [257, 260],
                "pad_token_id": 261,
                "tie_word_embeddings": False,
                "torch_dtype": "float32",
                "use_cache": True,
            }
        ),
    }
)

HUB_IDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "llama-3.3-70b": ("meta-llama/Llama-3.3-70B-Instruct",),
        "llama-3.1-70b": (
            "meta-llama/Llama-3.1-70B-Instruct",
            "meta-llama/Meta-Llama-3.1-70B-Instruct",
        ),
        "llama-3.1-8b": (
            "meta-llama/Llama-3.1-8B-Instruct",
            "meta-llama/Meta-Llama-3.1-8B-Instruct",
        ),
        "llama-3.2-3b": ("meta-llama/Llama-3.2-3B-Instruct",),
        "llama-3.2-1b": ("meta-llama/Llama-3.2-1B-Instruct",),
        "qwen2.5-72b": ("Qwen/Qwen2.5-72B-Instruct",),
        "qwen2.5-7b": ("Qwen/Qwen2.5-7B-Instruct",),
        "mistral-7b": ("mistralai/Mistral-7B-Instruct-v0.3",),
        "mixtral-8x7b": ("mistralai/Mixtral-8x7B-Instruct-v0.1",),
    }
)
"""Where each preset's own checkpoint lives on the hub."""

_BY_FOLDED_NAME: Mapping[str, str] = {
    **{name.casefold(): name for name in PRESETS},
    **{hub_id.casefold(): name for name, hub_ids in HUB_IDS.items() for hub_id in hub_ids},
}


def preset_name(model: str) -> str | None:
    """The preset that ``model`` names, as preset or as hub id, without regard to case."""
    return _BY_FOLDED_NAME.get(model.strip().casefold())
