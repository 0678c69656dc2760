"""Selectors: which keys are worth attending to, by looking at them; each is a value of `Attention(select=...)`.

They are approximations of attention, and exact about what they select: the same keys on every number of ranks and every layout.
"""

from __future__ import annotations

from ringctx.methods.selectors.flex_prefill import FlexPrefill
from ringctx.methods.selectors.infllm import Representatives
from ringctx.methods.selectors.moba import Moba
from ringctx.methods.selectors.quest import Quest
from ringctx.methods.selectors.sparge import Sparge
from ringctx.methods.selectors.vertical_slash import AShape, VerticalSlash
from ringctx.methods.selectors.x_attention import XAttention

__all__ = ["AShape", "FlexPrefill", "Moba", "Quest", "Representatives", "Sparge", "VerticalSlash", "XAttention"]
