"""Tiny models of families whose parts have other names, another order or another kind."""

from __future__ import annotations

from typing import Any

HIDDEN = 64

FAMILIES: dict[str, dict[str, Any]] = {
    # Sliding windows.
    "mistral": {"sliding_window": 8},
    # Embeddings scaled, or with positions or a norm before the first block.
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 16},
    "gpt2": {},
    "bloom": {},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": HIDDEN},
    # Another name for every part.
    "gpt_neox": {},
    "mpt": {},
    "recurrent_gemma": {"lru_width": HIDDEN, "block_types": ("recurrent", "attention")},
    # The norm after attention, so that attention gets the block's input.
    "olmo2": {},
    "exaone4": {"sliding_window": 8},
    # A norm without a weight.
    "olmo": {},
    # Says that all of it is its decoder.
    "llama4_text": {
        "intermediate_size_mlp": 128,
        "num_local_experts": 4,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 64,
    },
}

DEEPSEEK: dict[str, Any] = {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 192,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
}
"""Latent attention and experts, of a deepseek_v3 of any width."""


def family(kind: str, **fields: Any) -> Any:
    """A tiny float32 model of another family with four blocks."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(0)
    common: dict[str, Any] = {"vocab_size": 300, "initializer_range": 0.3, "pad_token_id": 0}
    fields = {**FAMILIES.get(kind, {}), **fields}
    if kind in ("gpt2", "bloom"):
        common |= {"n_embd": HIDDEN, "hidden_size": HIDDEN, "n_layer": 4, "n_head": 4}
    elif kind == "mpt":
        common |= {"d_model": HIDDEN, "n_layers": 4, "n_heads": 4, "max_seq_len": 512}
    elif kind in ("mamba", "falcon_mamba", "rwkv"):
        common |= {"hidden_size": HIDDEN, "num_hidden_layers": 4}
    else:
        common |= {
            "hidden_size": HIDDEN,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 512,
        }
    config = AutoConfig.for_model(kind, **common, **fields)
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(False)
        if "norm" in name or "ln_" in name:
            parameter.add_(torch.rand_like(parameter) * 0.3)
    return made
