"""Asked: what a configuration's attention block means, as values that the layers below know.

Knows configurations and methods. Knows nothing of models, ranks or caches.
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from ringctx.config import AttentionConfig, BranchesConfig, Config, EncodingConfig, PatternConfig, PositionsConfig
from ringctx.core.attention import Attention
from ringctx.core.pattern import Pattern
from ringctx.errors import ConfigError
from ringctx.methods import branches, extend
from ringctx.methods.clex import flow_of
from ringctx.methods.encodings import Coca, LogN, Unturned
from ringctx.methods.rotary import Rotary
from ringctx.methods.scores import Alibi, Softcap
from ringctx.methods.selective import Selective
from ringctx.patterns import causal, dilated, fixed, global_tokens, random_blocks, sinks, star, strided, window

logger = logging.getLogger(__name__)

T = TypeVar("T")


def attention_of(config: AttentionConfig, trained: int | None = None, heads: int = 1) -> Attention | None:
    """What the configuration puts in the place of the model's causal attention, or None for nothing.

    trained: tokens that the model was trained on. heads: its query heads, for scores that differ between them.
    Raises ConfigError for branches that cannot be, such as chunks beyond that, and patterns or scores with numbers that cannot be.
    """
    said = (config.pattern, config.scores, config.window, config.branches, config.carry.kind, config.encoding)
    if said == (PatternConfig(), (), None, BranchesConfig(), "none", EncodingConfig()):
        return None
    pattern = pattern_of(config.pattern)
    if config.window is not None:
        pattern &= window(config.window) | sinks(config.sinks) if config.sinks else window(config.window)
    carry = Selective(tau=config.carry.tau) if config.carry.kind == "selective" else None
    parts, encoding = branches_of(config.branches, trained), encoding_asked(config.encoding)
    if config.encoding.log_n is not None:
        by = partial(LogN, config.encoding.log_n, least=config.encoding.least)
        parts, encoding = tuple(replace(part, encoding=by(part.encoding)) for part in parts), None if parts else by(encoding)
    scores = tuple(Alibi.standard(heads) if score.kind == "alibi" else Softcap(_given(score.cap)) for score in config.scores)
    return Attention(pattern=pattern, encoding=encoding, branches=parts, carry=carry, scores=scores)


def pattern_of(config: PatternConfig) -> Pattern:
    """Who sees whom. Raises ConfigError for numbers that cannot be."""
    match config.kind:
        case "atrous":
            return causal() & dilated(_given(config.rate))
        case "sparse":
            return causal() & (window(_given(config.rate) + 1) | dilated(_given(config.rate)))
        case "strided":
            return strided(_given(config.length))
        case "fixed":
            return fixed(_given(config.length), _given(config.summaries))
        case "longformer":
            return causal() & (window(_given(config.window)) | global_tokens(_given(config.tokens)))
        case "bigbird":
            drawn = random_blocks(_given(config.block), _given(config.random), config.seed or 0)
            return causal() & (window(_given(config.window)) | global_tokens(_given(config.tokens)) | drawn)
        case "star":
            return star(_given(config.block), _given(config.context))
    return causal()


def encoding_asked(config: EncodingConfig) -> Any:
    """The encoding without frequencies: the wrapped model gives its own. None stands for the rotary one."""
    if config.kind == "none":
        return Unturned()
    return None if config.kind == "rotary" else Coca(strict=config.kind == "coca_strict")


def branches_of(config: BranchesConfig, trained: int | None) -> branches.Branches:
    """The branches of the configuration, without frequencies: the wrapped model gives its own. trained: as above."""
    match config.kind:
        case "rerope":
            return branches.rerope(_given(config.window))
        case "leaky_rerope":
            return branches.leaky_rerope(_given(config.window), _given(config.factor))
        case "self_extend":
            return branches.self_extend(_given(config.window), _given(config.group))
        case "lm_infinite":
            return branches.lm_infinite(_given(config.window), _given(config.sinks), config.length)
        case "streaming":
            return branches.streaming(_given(config.window), _given(config.sinks))
        case "dual_chunk":
            length = config.length or trained
            if length is None:
                raise ConfigError("The model does not say how many tokens it was trained on; set attention.branches.length for dual_chunk.")
            return branches.dual_chunk(_given(config.chunk), length)
    return ()


def _given(value: T | None) -> T:
    """A key that this kind takes, so the configuration has refused to be without it."""
    assert value is not None
    return value


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
        case "clex":
            return flow_of(known, math.ceil(factor), config.flow).rotary(length)
    return known.rotary


def warn_if_long(config: Config, trained: int | None, num_tokens: int) -> None:
    """Log it when a prompt of so many tokens and its answer go beyond what the model was trained on, stretched or recalled."""
    positions, recall = config.positions, config.cache.recall
    if not trained or positions.kind == "dynamic_ntk" or recall.blocks:  # these go as far as they are asked
        return
    asked = num_tokens + config.generation.max_new_tokens
    if asked > trained * (positions.factor or 1.0):
        stretched = f" and stretched {positions.factor:g} times" if positions.factor else ""
        logger.warning(
            "Prompt and answer may take %d tokens, but the model was trained on %d%s; expect worse answers.", asked, trained, stretched
        )
