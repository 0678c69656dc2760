"""Asked: what the configuration asks of the model's attention, as values of the core and of the methods."""

from __future__ import annotations

from ringctx.config import AttentionConfig, PositionsConfig
from ringctx.core.attention import Attention
from ringctx.methods import extend
from ringctx.methods.rotary import Rotary
from ringctx.patterns import causal, sinks, window


def attention_of(config: AttentionConfig) -> Attention | None:
    """What the configuration puts in the place of the model's causal attention, or None for nothing."""
    if config.window is None:
        return None
    seen = window(config.window) | sinks(config.sinks) if config.sinks else window(config.window)
    return Attention(pattern=causal() & seen)


def encoding_of(config: PositionsConfig, known: extend.Trained, length: int) -> Rotary:
    """How positions turn in a sequence of `length` tokens, the same on all ranks, for a model trained as `known` says."""
    factor = config.factor or 1.0
    match config.kind:
        case "pi":
            return extend.interpolated(known, factor)
        case "ntk":
            return extend.ntk(known, factor)
        case "dynamic_ntk":
            return extend.dynamic_ntk(known, factor, length)
        case "yarn":
            return extend.yarn(known, factor, config.beta_fast, config.beta_slow)
        case "longrope":
            return extend.longrope(known, factor, length, short=config.short, long=config.long)
    return known.rotary
