"""Blocks by a few representative keys, beside the first and the latest keys; after InfLLM.

Source: arXiv 2402.04617, whose representatives are chosen once by the queries that followed a block; here no query is kept, so the
queries of the call choose them. Letters: s queries here, n keys here, L recent queries, h heads, g key heads, r representatives.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ringctx.core.header import share
from ringctx.core.pattern import Pattern
from ringctx.core.select import Sight
from ringctx.methods.selectors.summaries import KIND, at_least_one, largest, num_blocks, rows_seen
from ringctx.methods.selectors.vertical_slash import last_queries
from ringctx.patterns import sinks, window


@dataclass(frozen=True)
class Representatives:
    """Per head: the first `initial` keys, the latest `local` ones, and the `blocks` blocks of the greatest relevance.

    Recent queries are the last `recent` of this call: of the chunk in prefill, all new tokens while decoding. A key's relevance is the
    sum of its products with those recent queries that do not stand before it; a block's representatives are its `representatives` most
    relevant keys, and its relevance is their mean. All queries of a call see the same blocks. Of each block a rank sends the relevance
    of its own best few keys, never a key. Raises ConfigError.
    """

    blocks: int = 16
    block: int = 128
    representatives: int = 4
    recent: int = 64
    initial: int = 128
    local: int = 1024
    prefill = True
    decode = True
    trains = False

    def __post_init__(self) -> None:
        at_least_one("Representatives", blocks=self.blocks, block=self.block, representatives=self.representatives)
        at_least_one("Representatives", recent=self.recent, initial=self.initial, local=self.local)

    def select(self, q: Tensor, k: Tensor, sight: Sight) -> Pattern:
        if sight.decoding:
            rows, queries = sight.layout.indices(0), q
        else:
            rows, queries = last_queries(q, sight, self.recent)
        keys = sight.key_layout.indices(sight.ring.rank)
        before, ratio = (rows[:, None] >= keys).double().to(q.device), q.shape[1] // k.shape[1]  # (L n)
        products = lambda head: queries[:, head].double() @ k[:, head // ratio].double().T
        relevance = torch.stack([(products(head) * before).sum(0) for head in range(q.shape[1])])
        best = torch.stack(share(sight.ring, self._best(relevance, keys.to(q.device), sight.length), KIND))  # (R h blocks r)
        best = best.permute(1, 2, 0, 3).flatten(2).sort(-1, descending=True).values[..., : self.representatives]
        there = ~best.isneginf()
        scores = best.masked_fill(~there, 0.0).sum(-1) / there.sum(-1).clamp(min=1)
        chosen = largest(scores.masked_fill(~there.any(-1), -torch.inf), self.blocks)
        return sinks(self.initial) | window(self.local) | rows_seen(chosen[:, None], 0, sight.length, self.block)

    def _best(self, relevance: Tensor, keys: Tensor, length: int) -> Tensor:
        """The greatest relevance of this rank's keys in each block: (h, n) -> (h, blocks, r), -inf where there are fewer keys."""
        shape = (len(relevance), num_blocks(length, self.block), self.representatives)
        best = relevance.new_full(shape, -torch.inf)
        if not len(keys):
            return best
        order = relevance.argsort(dim=-1, descending=True, stable=True)
        order = order.gather(-1, (keys // self.block)[order].argsort(dim=-1, stable=True))  # by block, in each the greatest first
        blocks = (keys // self.block).sort().values
        place = torch.arange(len(blocks), device=keys.device) - torch.searchsorted(blocks, blocks)
        few = place < self.representatives
        best[:, blocks[few], place[few]] = relevance.gather(-1, order)[:, few]
        return best
