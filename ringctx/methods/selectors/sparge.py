"""SpargeAttn, its first stage: blocks whose tokens are alike are judged by their means.

Source: arXiv 2502.18137 and its code; the second stage lives in a kernel and is not here. Letters: h heads, m query blocks, n key blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ringctx.core.layout import Layout
from ringctx.core.pattern import Pattern
from ringctx.core.select import Sight
from ringctx.errors import ConfigError
from ringctx.methods.selectors.summaries import at_least_one, block_means, tiles_seen, within_share
from ringctx.patterns import window


@dataclass(frozen=True)
class Sparge:
    """Per head and block of queries: the key blocks that hold `mass` of softmax(mean(q) . mean(k)), at least one.

    A block is alike where the mean product of its normalised tokens is above `similarity`; blocks that are not are always kept, as
    columns or rows, and such key blocks are left out of the softmax. Only key blocks that begin no later than the block of queries
    ends are seen. Of the largest, as many are kept as stay within `mass` together. smooth: take the mean of all keys from each
    first. A query always sees its own key, since no block that it may look into need be among those kept. Raises ConfigError.
    """

    similarity: float = 0.6
    mass: float = 0.98
    block_q: int = 128
    block_k: int = 64
    smooth: bool = False
    prefill = True
    decode = False
    trains = False

    def __post_init__(self) -> None:
        at_least_one("Sparge", block_q=self.block_q, block_k=self.block_k)
        if not 0 < self.mass <= 1 or not -1 <= self.similarity <= 1:
            raise ConfigError(f"Sparge was given similarity {self.similarity}, mass {self.mass}; -1 <= similarity <= 1 and 0 < mass <= 1.")

    def select(self, q: Tensor, k: Tensor, sight: Sight) -> Pattern:
        if self.smooth:
            k = k.double() - block_means(sight.ring, k, sight.key_layout, sight.length, sight.length)[0]
        queries, q_alike, asked = self._pooled(q, sight, sight.layout, self.block_q)
        keys, k_alike, there = self._pooled(k, sight, sight.key_layout, self.block_k)
        ratio = q.shape[1] // k.shape[1]
        keys, k_alike = keys.repeat_interleave(ratio, 1), k_alike.repeat_interleave(ratio, 1).T
        m, n = (torch.arange(len(x), device=q.device) for x in (queries, keys))
        seen = (n * self.block_k < ((m + 1) * self.block_q)[:, None]) & there
        logits = torch.einsum("mhd,nhd->hmn", queries, keys) * sight.scale
        weights = torch.softmax(logits.masked_fill(~(seen & k_alike[:, None]), -torch.inf), -1).nan_to_num(0.0)
        counts = within_share(weights, self.mass).clamp(min=1)
        order = weights.float().masked_fill(~(seen & k_alike[:, None]), -torch.inf).sort(dim=-1, descending=True, stable=True).indices
        largest = order.argsort(-1) < counts[..., None]
        kept = (largest & k_alike[:, None]) | ~k_alike[:, None] | ~q_alike.T[..., None]
        return tiles_seen(kept & seen & asked[:, None], (self.block_q, self.block_k)) | window(1)

    def _pooled(self, x: Tensor, sight: Sight, layout: Layout, block: int) -> tuple[Tensor, Tensor, Tensor]:
        """Each block's mean (blocks, h, d), whether its tokens are alike (blocks, h), and whether it has any (blocks,)."""
        means, counts = block_means(sight.ring, x, layout, block, sight.length)
        directions, _ = block_means(sight.ring, normalize(x.double(), dim=-1), layout, block, sight.length)
        return means, directions.square().sum(-1).float() > self.similarity, counts > 0
