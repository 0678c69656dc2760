"""Layers: what a configuration asks of each layer of a model, whose attention may differ by layer and by head.

Knows configurations and how many layers and heads a model has. Knows nothing of its weights, ranks or caches.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

from ringctx.asked.attention import attention_of
from ringctx.asked.selecting import selecting, selector_of
from ringctx.config import AttentionConfig, LayersConfig
from ringctx.config_layers import Parts, by_layer
from ringctx.core.attention import Attention
from ringctx.patterns import per_head


def layers_of(asked: AttentionConfig | tuple[LayersConfig, ...], model: Any) -> Attention | dict[int, Attention] | None:
    """What `wrap` takes: an attention for all layers, one for each, or None for the model's own. model: its transformers configuration.

    Raises ConfigError for layers, heads or branches that the model cannot have. Layers that are asked the same share one value.
    """
    num_layers, trained = int(model.num_hidden_layers), getattr(model, "max_position_embeddings", None)
    num_heads = int(model.num_attention_heads)
    if isinstance(asked, AttentionConfig):
        return selecting(attention_of(asked, trained, num_heads), asked.select, num_layers)
    made = cache(_attention)
    return {layer: made(parts, trained, num_heads) for layer, parts in by_layer(asked, num_layers, num_heads).items()}


def _attention(parts: Parts, trained: int | None, num_heads: int) -> Attention:
    """One layer's, from its heads; they share all but the pattern."""
    patterns = {}
    for heads, block in parts:
        attention = attention_of(block, trained, num_heads) or Attention()
        patterns[attention.pattern] = heads
    pattern = per_head(patterns) if len(patterns) > 1 else attention.pattern
    return replace(attention, pattern=pattern, select=selector_of(block.select))
