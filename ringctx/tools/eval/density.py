"""Density: how much of causal attention is computed, counted from the patterns and not from plans, so kernels do not matter."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache

import torch

from ringctx.core.pattern import PARTIAL, Pattern
from ringctx.core.tiles import area, tiles
from ringctx.runtime.engine import Engine


def density(engine: Engine, length: int) -> float:
    """Pairs allowed over pairs that causal attention has, length (length + 1) / 2; the mean of all layers and heads.

    It asks what the layers attended last, so the engine must have read something.
    """
    heads = int(engine.model.config.num_attention_heads)
    layers = Counter(engine.context.patterns.values())
    allowed = sum(times * len(group) * pairs(part, length) for whole, times in layers.items() for group, part in whole.heads(heads))
    return 2 * allowed / (length * (length + 1) * heads * layers.total())


@lru_cache(maxsize=256)
def pairs(pattern: Pattern, length: int) -> int:
    """How many (query, key) pairs among the first `length` indices the pattern allows; it has no heads of its own."""
    whole = (range(length),)
    return sum(_masked(pattern, *tile[1:]) if tile[0] == PARTIAL else area((tile,)) for tile in tiles(pattern, whole, whole))


def _masked(pattern: Pattern, a: int, b: int, c: int, d: int) -> int:
    return int(pattern.allows(torch.arange(a, b), torch.arange(c, d)).sum())
