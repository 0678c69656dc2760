"""A transformers model whose attention, rotary encoding and cache are ringctx's. See `wrap`."""

from __future__ import annotations

from ringctx.huggingface.context import Cache, Context
from ringctx.huggingface.families import FAMILIES, Family, trained_of
from ringctx.huggingface.wrap import turn, unwrap, wrap

__all__ = ["FAMILIES", "Cache", "Context", "Family", "trained_of", "turn", "unwrap", "wrap"]
