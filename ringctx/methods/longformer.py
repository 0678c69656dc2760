"""Longformer and LongNet: static patterns that one attention alone does not say.

Longformer: a few global tokens see all tokens and are seen by all, through projections of their own.
LongNet: dilated attention of several reaches, each in its segments, added up by what their denominators weigh.
Source: Beltagy, Peters & Cohan 2020 (Longformer, arXiv 2004.05150), section 3.1; Ding et al. 2023 (LongNet, arXiv 2307.02486), section 3.
Letters: b batch, s tokens here, h query heads, g key heads, d key width, e value width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ringctx.core.attention import Attention, Encoding
from ringctx.core.entry import ring_attention
from ringctx.core.layout import Layout, ranges_of
from ringctx.core.lines import Lines
from ringctx.core.pattern import Pattern
from ringctx.core.ring import Ring
from ringctx.core.rules import some
from ringctx.errors import ConfigError, LayoutError
from ringctx.methods.sighted import attend_with_lse, sight_at
from ringctx.patterns import band, causal, dilated, full, own_block

Projections = tuple[Tensor, Tensor, Tensor]
"""q (b s h d), k (b s g d), v (b s g e) of this rank's tokens."""


def longformer_attention(
    local: Projections, of_all: Projections, *, tokens: Iterable[int], window: int, ring: Ring, layout: Layout, pattern: Pattern = full()
) -> Tensor:
    """-> (b s h e): one softmax over the window and the global tokens; rows of global tokens see all tokens. All ranks together.

    local: projections of windows and of what all see of global tokens. of_all: those by which global tokens see all.
    tokens: the global ones, by index. window: keys on each side. pattern: narrows both, such as causal().
    A ring exchanges the halo, the keys of global tokens once, and global queries with what comes of them.
    Raises LayoutError for tokens beyond the sequence, and what ring_attention raises.
    """
    named = torch.tensor(sorted(set(tokens)), dtype=torch.int64)
    beyond = named[(named < 0) | (named >= layout.length)].tolist()
    if beyond:
        raise LayoutError(f"Global tokens are named by index, 0 to {layout.length - 1} here, and {some(beyond)} is not there.")
    near = pattern & (band(-window, window) | Lines(tuple(named.tolist()), ()))
    q, k, v = local
    out = ring_attention(q, k, v, ring=ring, layout=layout, attention=Attention(pattern=near))
    assert isinstance(out, Tensor)
    held = [torch.isin(layout.indices(r), named).nonzero()[:, 0] for r in range(ring.size)]
    rows = Layout(tuple(_ascending(layout.indices(r)[at]) for r, at in enumerate(held)))
    mine = held[ring.rank].to(out.device)
    q, k, v = of_all
    found = ring_attention(q[:, mine], k, v, ring=ring, layout=rows, key_layout=layout, attention=Attention(pattern=pattern))
    assert isinstance(found, Tensor)
    return out.index_copy(1, mine, found)


def dilated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    reaches: Sequence[tuple[int, int]],
    ring: Ring,
    layout: Layout | None,
    key_layout: Layout | None = None,
    encoding: Encoding | None = None,
) -> Tensor:
    """q (b s h d), k (b n g d), v (b n g e) -> (b s h e), causal, over every reach (segment, rate). All ranks together.

    A reach lets a token see, in its own segment, each rate-th key counted from itself. Each reach has a softmax of its own, and they are
    weighed by their denominators; a key that two of them see counts twice. LongNet's are ((2048, 1), (4096, 2), (8192, 4), ...). It shifts
    the keys of each head by one more; here all heads count from the query, so that each row has all its reaches.
    layout: as in ring_attention; None while decoding, when every rank holds the newest tokens, the last of key_layout, without backward.
    Raises ConfigError without reaches, and what ring_attention raises.
    """
    if not reaches:
        raise ConfigError("dilated_attention was given no reaches; write pairs of a segment and a rate, such as ((2048, 1), (4096, 2)).")
    sight = sight_at(f"dilated attention {tuple(reaches)}", q, k, v, ring=ring, layout=layout, key_layout=key_layout)
    pattern = lambda segment, rate: causal() & own_block(segment) & dilated(rate)
    parts = [attend_with_lse(sight, Attention(pattern=pattern(*reach), encoding=encoding), q, k, v) for reach in reaches]
    weights = torch.stack([lse for _, lse in parts]).softmax(0).unsqueeze(-1)  # a row sees itself in every reach: no row is all -inf
    return torch.stack([out.to(weights.dtype) for out, _ in parts]).mul(weights).sum(0).to(q.dtype)


def _ascending(indices: Tensor) -> tuple[range, ...]:
    """A rank's tokens in their own order, which need not ascend."""
    breaks = (indices.diff() < 0).nonzero()[:, 0] + 1
    return tuple(r for part in indices.tensor_split(breaks.tolist()) for r in ranges_of(part))
