"""Density: how much of causal attention is computed, counted from the patterns and not from plans, so kernels do not matter."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache

import torch

from ringctx.core.layout import Layout
from ringctx.core.pattern import PARTIAL, Pattern
from ringctx.core.tiles import area, tiles
from ringctx.runtime.engine import Engine


def density(engine: Engine) -> float:
    """Pairs allowed over pairs that causal attention has, n (n + 1) / 2 for n tokens; the mean of all layers and heads.

    It asks what the layers attended in the prompt read last, chunk by chunk, what selectors chose included; 1 where none was read.
    """
    heads = int(engine.model.config.num_attention_heads)
    layers = Counter(tuple(chunks) for chunks in engine.context.chunks.values())
    allowed = sum(
        times * len(group) * pairs(part, layout.length, _span(layout))
        for chunks, times in layers.items()
        for layout, whole in chunks
        for group, part in whole.heads(heads)
    )
    if not layers:
        return 1.0
    lengths = {chunks: chunks[-1][0].length for chunks in layers}
    return 2 * allowed / (heads * sum(times * lengths[chunks] * (lengths[chunks] + 1) for chunks, times in layers.items()))


def _span(layout: Layout) -> range:
    """The indices of a chunk, which has no gaps."""
    return range(layout.length - sum(layout.count(r) for r in range(layout.size)), layout.length)


@lru_cache(maxsize=256)
def pairs(pattern: Pattern, length: int, queries: range | None = None) -> int:
    """How many pairs of these queries (all by default) and the first `length` keys the pattern allows; it has no heads of its own."""
    queries = range(length) if queries is None else queries
    q, k = (queries,), (range(length),)
    return sum(
        _masked(pattern, queries[tile[1] : tile[2]], *tile[3:]) if tile[0] == PARTIAL else area((tile,)) for tile in tiles(pattern, q, k)
    )


def _masked(pattern: Pattern, queries: range, c: int, d: int) -> int:
    return int(pattern.allows(torch.arange(queries.start, queries.stop), torch.arange(c, d)).sum())
