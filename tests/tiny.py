"""Small random models of every family, for tests."""

from __future__ import annotations

from typing import Any

import torch
import transformers

WINDOWS = {"sliding_window": 16}
MIXED = {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 2}
EXTRA: dict[str, dict[str, Any]] = {
    "mistral": WINDOWS,
    "starcoder2": WINDOWS,
    "mixtral": {**WINDOWS, "num_local_experts": 4},
    "gemma2": {**WINDOWS, "head_dim": 32},
    "qwen2": MIXED,
    "qwen3": {**MIXED, "head_dim": 32},
    "qwen3_moe": {**MIXED, "head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "gemma3_text": {**WINDOWS, "head_dim": 32, "query_pre_attn_scalar": 20, "sliding_window_pattern": 2},
    "gpt_oss": {
        **WINDOWS, "head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 150_000.0, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
            "original_max_position_embeddings": 64,
        },
    },
    "phi3": {**WINDOWS, "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.75}},
    "olmo3": {
        **WINDOWS, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            "full_attention": {"rope_type": "yarn", "rope_theta": 500_000.0, "factor": 4.0, "original_max_position_embeddings": 64},
        },
    },
    "exaone4": {**WINDOWS, "sliding_window_pattern": 2},
    "granite": {"attention_multiplier": 0.3, "logits_scaling": 2.0},
}  # fmt: skip


def tiny(kind: str = "llama", **extra: Any) -> Any:
    """A small random model of a family, with its own eager attention."""
    shape: dict[str, Any] = {
        "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    config = transformers.AutoConfig.for_model(kind, **(shape | EXTRA.get(kind, {}) | extra))
    config._attn_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(3 if weight.ndim > 1 else 1)  # sharper attention, so that a wrong mask shows
            if name.endswith("sinks"):
                weight.copy_(torch.linspace(-2, 2, len(weight)))
    return model
