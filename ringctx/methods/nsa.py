"""NSA, native sparse attention: three branches of attention with a gate each, of which all are trained.

    out = g_c attention(q, compressed k, compressed v) + g_s attention over the best blocks + g_w attention over a window

Compressed: the mean of each whole block, seen from the block's last token on. The best blocks of a key head: those with the largest sum,
over its query heads, of compressed attention; a query's own block counts as 1. No gradient flows through the choice.
Source: Yuan et al. 2025 (NSA, arXiv 2502.11089), equations 5 to 12; means in the place of its learned compression, and blocks of one size,
as in the open implementation of Yang & Zhang. Sums of blocks travel, a row a block, then the blocks that were chosen and the window.
Letters: b batch, s queries here, n keys here, h query heads, g key heads, d width, m whole blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ringctx.core.attention import Attention, Encoding
from ringctx.core.entry import ring_attention
from ringctx.core.layout import Layout
from ringctx.core.pattern import Pattern
from ringctx.core.ring import Ring
from ringctx.core.select import Sight
from ringctx.errors import LayoutError
from ringctx.methods.selectors.summaries import at_least_one, block_means, chosen, largest
from ringctx.methods.sighted import Chosen, attend, places, sight_at
from ringctx.patterns import causal, window


@dataclass(frozen=True)
class NativeSparse:
    """blocks: how many each query sees, of `block` tokens each, its own among them. window: latest keys, the token among them.

    Raises ConfigError for numbers below 1.
    """

    block: int = 64
    blocks: int = 16
    window: int = 512

    def __post_init__(self) -> None:
        at_least_one("NativeSparse", block=self.block, blocks=self.blocks, window=self.window)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Tensor,
        *,
        ring: Ring,
        layout: Layout | None,
        key_layout: Layout | None = None,
        encoding: Encoding | None = None,
        transport: str = "auto",
    ) -> Tensor:
        """q (b s h d), k (b n g d), v (b n g e), gates (b s h 3) for compressed, chosen, window -> (b s h e). All ranks together.

        layout: where queries live, keys too without key_layout; None while decoding, when every rank holds the newest tokens, the last of
        key_layout, and there is no backward. encoding: of queries and keys by index; compressed keys are means of encoded ones.
        Raises what ring_attention and decode_attention raise, LayoutError where keys are missing from a block.
        """
        sight = sight_at(self, q, k, v, ring=ring, layout=layout, key_layout=key_layout, scale=q.shape[3] ** -0.5)
        if encoding is not None:
            q = encoding.queries(q, places(sight, q))
            k = encoding.keys(k, sight.key_layout.indices(ring.rank, k.device))
        rows = [self._row(sight, transport, *(x[n : n + 1] for x in (q, k, v, gates))) for n in range(len(q))]
        return torch.cat(rows)

    def _row(self, sight: Sight, transport: str, q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
        """One sequence; encoded."""
        means = [self._means(x[0], sight) for x in (k, v)]
        compressed = self._compressed(q, means, sight)
        pattern = self._choose(q[0].detach(), means[0].detach(), sight)
        branches = Attention(select=Chosen(pattern)), Attention(pattern=causal() & window(self.window))
        selected, near = (attend(sight, attention, q, k, v, transport=transport) for attention in branches)
        first, second, third = gates.unsqueeze(-1).to(q.dtype).unbind(-2)
        return first * compressed + second * selected + third * near

    def _means(self, x: Tensor, sight: Sight) -> Tensor:
        """Keys or values (n g d) of this rank -> the means of all whole blocks (m g d), float64, on every rank."""
        layout = sight.key_layout
        if sum(map(layout.count, range(layout.size))) != sight.length:
            raise LayoutError(f"NSA takes means of whole blocks, and the keys' layout has gaps: {layout}. Give it every key.")
        means, _ = block_means(sight.ring, x, layout, self.block, sight.length)
        return means[: sight.length // self.block]

    def _compressed(self, q: Tensor, means: list[Tensor], sight: Sight) -> Tensor:
        """Attention over the means, which every rank has: nothing travels."""
        alone, rows = Ring.alone(), sight.layout.spans[0 if sight.decoding else sight.ring.rank]
        ends = range(self.block - 1, self.block * len(means[0]), self.block)
        last = Layout(((ends,) if ends else (),))
        k, v = (x[None].to(q.dtype) for x in means)
        found = ring_attention(q, k, v, ring=alone, layout=Layout((rows,)), key_layout=last, attention=Attention(), transport="fetch")
        assert isinstance(found, Tensor)
        return found

    def _choose(self, q: Tensor, means: Tensor, sight: Sight) -> Pattern:
        """The best blocks of encoded q (s h d), alike for the heads that share keys; on every rank."""
        at, group = places(sight, q), q.shape[1] // means.shape[1]
        n, own = torch.arange(-(-sight.length // self.block), device=q.device), (at // self.block)[:, None, None]
        logits = torch.einsum("sgrd,mgd->sgrm", q.double().unflatten(1, (-1, group)), means) * sight.scale
        unseen = (n[: len(means)] + 1) * self.block > at[:, None, None, None] + 1
        weights = logits.masked_fill(unseen, -torch.inf).softmax(-1).nan_to_num(0.0).sum(2)  # rows that see no mean are NaN
        scores = torch.nn.functional.pad(weights, (0, len(n) - len(means)))
        scores = scores.masked_fill(n > own, -torch.inf).masked_fill(n == own, float(group))
        return chosen(sight, largest(scores, self.blocks).repeat_interleave(group, 1), self.block)
