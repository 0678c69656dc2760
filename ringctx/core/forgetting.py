"""A carry and keys at explicit indices: what is left of a cache when the most forgotten keys were dropped.

Keys of the cache come before all queries of a call, so two passes suffice: head 0's keys visit every rank and are given to, a scan
over the chunks of queries sums it, then keys and values visit. All heads of a batch row keep the same tokens, since all subtract
the same F. Knows who sends what to whom; the mathematics is in `ringctx.core.carried`.
Letters: b batch, s query tokens here, n slots here, h query heads, g key heads, d key width, e value width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ringctx.core.attention import Attention
from ringctx.core.carried import CarriedWork, strips
from ringctx.core.carry import Chunk, Order, order_of, spared
from ringctx.core.compute import HeadGroup, Work, head_groups
from ringctx.core.explicit import Keys, hull, scores_at
from ringctx.core.header import share
from ringctx.core.layout import Layout
from ringctx.core.partial import Partial
from ringctx.core.pattern import EMPTY, FULL, PARTIAL
from ringctx.core.ring import Ring
from ringctx.core.scan import Packed, scan
from ringctx.core.tiles import Tile
from ringctx.core.visiting import check, encoded, visitors
from ringctx.kernels.base import TileScores

if TYPE_CHECKING:
    from ringctx.core.tiles import Spans


@dataclass(frozen=True)
class Scattered:
    """A meeting of queries q (b s h d), of indices i (s), with keys k (b n g d), both encoded, at indices j (b n), -1 where empty."""

    attention: Attention
    q: Tensor
    i: Tensor
    k: Tensor
    v: Tensor | None
    j: Tensor

    @property
    def spared(self) -> Tensor:
        """Which keys are the first of a document, bool (b n)."""
        first = [spared(self.attention.pattern, row) for row in self.j]
        return torch.stack([x[n if len(x) > 1 else 0] for n, x in enumerate(first)])

    def tiles(self, chunk: Chunk) -> list[Tile]:
        """Where this chunk's queries may see keys, in small pieces."""
        filled = self.j[self.j >= 0]
        rows = self.i[chunk.begin : chunk.end]
        verdict = self.attention.pattern.judge(hull(rows), hull(filled)) if len(filled) and len(rows) else EMPTY
        if verdict == EMPTY:
            return []
        plain = verdict == FULL and filled.numel() == self.j.numel()
        return strips([(int(FULL if plain else PARTIAL), chunk.begin, chunk.end, 0, self.j.shape[1])], chunk)

    def strictly_earlier(self, tile: Tile) -> Tensor | None:
        """Pairs whose key comes before the query: bool (b q k), or None where all do."""
        verdict, a, b, c, d = tile
        i, j = self.i[a:b], self.j[:, c:d]
        if verdict == FULL and int(i.min()) > int(j.max()):
            return None
        return (j[:, None] < i[:, None]) & (j[:, None] >= 0)

    def scores(self, work: Work, group: HeadGroup, tile: Tile, backward: bool) -> TileScores:
        """What happens to the logits of these heads."""
        verdict, a, b, c, d = tile
        return scores_at(self.attention, self.i[a:b], self.j[:, None, c:d], group.heads, self.q.shape[3], verdict == FULL)


def attend_forgetting(
    q: Tensor, keys: Keys, carry: Tensor, *, i: Tensor, layout: Layout, ring: Ring, attention: Attention
) -> tuple[Partial, Tensor]:
    """Attention of this rank's queries to the keys that all ranks hold at explicit indices, all earlier; the sink is left out.

    q (b s h d), not encoded, of indices i (s), which `layout` gives this rank; keys: all heads of this rank's cache, at the same
    indices in all of them; carry (b n): what they carry -> out (b s h e), lse (b s h), and what this rank's keys carry now (b n).
    All ranks must call it together. No gradient. Raises LayoutError, Unsupported, RanksDisagree, RankLost.
    """
    check("attention at explicit indices with a carry", q, [keys], ring, attention)
    with torch.no_grad(), ring.unbroken("forgetting keys"):
        q, (keys,) = encoded(attention, q, i, [keys])
        work, j = _work(q, keys, attention), keys.indices[:, 0].contiguous()
        sizes = [int(n) for n in share(ring, torch.tensor([j.shape[1]]), "header")] if ring.size > 1 else [j.shape[1]]
        order = _order(attention, layout, sizes)
        given = [Packed.zeros(order, ring.rank, owner, carry) for owner in range(ring.size)]
        for owner, (k, at) in _visits(ring, (keys.k[:, :, :1].contiguous(), j)):
            meeting = Scattered(attention, q, i, k, None, at)
            for number in order.mine(ring.rank):
                sums = carry.new_zeros(q.shape[0], sizes[owner])
                work.give(meeting, meeting.tiles(order.chunks[number]), sums)
                given[owner].put(number, sums, order.spans[number][owner])
        met, now = scan(ring, order, given, carry)
        (total,) = work.empty(q, keys.v.shape[3])
        for owner, (k, v, at) in _visits(ring, (keys.k, keys.v, j)):
            meeting = Scattered(attention, q, i, k, v, at)
            for number in order.mine(ring.rank):
                sums = met[owner].spread(number, order.spans[number][owner])
                work.attend(total, None, meeting, meeting.tiles(order.chunks[number]), sums)
        return total, now


def attend_forgetting_here(attention: Attention, q: Tensor, i: Tensor, keys: Keys, carry: Tensor) -> Partial:
    """The same of queries that every rank has, ascending, to keys that are here, new ones among them; q and keys encoded.

    carry (b n) is added to in place. Sends nothing.
    """
    work, meeting = _work(q, keys, attention), Scattered(attention, q, i, keys.k, keys.v, keys.indices[:, 0])
    (total,) = work.empty(q, keys.v.shape[3])
    work.attend(total, None, meeting, meeting.tiles(Chunk(0, 0, len(i), range(len(i)))), carry)
    return total


def _work(q: Tensor, keys: Keys, attention: Attention) -> CarriedWork:
    params = [p.detach() for p in attention.params()]
    return CarriedWork(attention, head_groups(attention, q.shape[2], keys.k.shape[2]), params, "auto", 0, 0)


def _order(attention: Attention, layout: Layout, sizes: list[int]) -> Order:
    """All chunks of queries, each of which meets every slot of every owner."""
    chunks = order_of(attention.pattern, layout, layout).chunks
    all_slots: tuple[Spans, ...] = tuple(((0, size),) if size else () for size in sizes)
    return Order(chunks, (all_slots,) * len(chunks))


def _visits(ring: Ring, mine: tuple[Tensor, ...]) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """Each rank's tensors, with its number; one's own first."""
    for hop, block in enumerate(visitors(ring, "keys", mine, (1,) * len(mine))):
        yield (ring.rank - hop) % ring.size, block
