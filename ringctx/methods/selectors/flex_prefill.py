"""FlexPrefill: each head decides by the last block of queries whether whole columns and diagonals of blocks will do.

Source: arXiv 2502.20766 and its code; where the code divides by 128, this divides by the block. Letters: h heads, m query blocks,
n key blocks, N indices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ringctx.core.pattern import Full, Pattern
from ringctx.core.select import Sight
from ringctx.errors import ConfigError
from ringctx.methods.selectors.summaries import at_least_one, block_means, largest, num_blocks, tiles_seen, within_share
from ringctx.methods.selectors.vertical_slash import last_queries, sums_of_last


@dataclass(frozen=True)
class FlexPrefill:
    """Per head: columns and diagonals of blocks that hold `gamma` of the last block's attention, or tiles by pooled products.

    With A the causal softmax of the last `block` queries, divided by how many they are: the best single columns (and diagonals) that
    stay within `gamma` of A are counted; that count // block + 1, and at least `least` tokens, is how many block columns (diagonals)
    are kept, the first column and the nearest diagonal always. A head is query-aware where the square root of the Jensen-Shannon divergence
    between A by block and the softmax of mean(q_last) . mean(k) is below `tau`: it keeps `least` tokens of each, and besides of
    softmax(mean(q) . mean(k)), rows divided by their number, the largest tiles that stay within gamma.
    Dense for no more queries than 2 blocks, or `least`. Raises ConfigError.
    """

    gamma: float = 0.9
    tau: float = 0.1
    least: int = 1024
    block: int = 128
    prefill = True
    decode = False
    trains = False

    def __post_init__(self) -> None:
        at_least_one("FlexPrefill", least=self.least, block=self.block)
        if not 0 < self.gamma <= 1 or self.tau < 0:
            raise ConfigError(f"FlexPrefill was given gamma {self.gamma} and tau {self.tau}; 0 < gamma <= 1 and tau >= 0.")

    def select(self, q: Tensor, k: Tensor, sight: Sight) -> Pattern:
        num_queries = sum(sight.layout.count(r) for r in range(sight.ring.size))
        if num_queries <= max(2 * self.block, self.least):
            return Full()
        vertical, slash = (x.clamp(min=0) / min(self.block, num_queries) for x in sums_of_last(q, k, sight, self.block))
        columns, diagonals = self._by_block(vertical), self._by_block(slash)
        queries, q_counts = block_means(sight.ring, q, sight.layout, self.block, sight.length)
        keys, k_counts = block_means(sight.ring, k, sight.key_layout, self.block, sight.length)
        keys = keys.repeat_interleave(q.shape[1] // k.shape[1], 1)
        there = k_counts > 0
        guess = self._guess(last_queries(q, sight, self.block)[1], keys, there, sight.scale)
        aware = distance(guess, columns) < self.tau
        fewest = num_blocks(self.least, self.block)
        wide = [torch.where(aware, fewest, (within_share(x, self.gamma) // self.block + 1).clamp(min=fewest)) for x in (vertical, slash)]
        m = torch.arange(len(there), device=q.device)
        apart = m[:, None] - m
        mask = torch.zeros(q.shape[1], len(m), len(m), dtype=torch.bool, device=q.device)
        for head in range(q.shape[1]):
            kept = [largest(self._forced(x[head]), int(count[head])) for x, count in zip((columns, diagonals), wide, strict=True)]
            mask[head] = kept[0][None] | kept[1][apart.clamp(min=0)]
            if aware[head]:
                mask[head] |= self._pooled(queries[:, head], keys[:, head], q_counts > 0, there, sight.scale)
        return tiles_seen(mask & (apart >= 0) & (q_counts > 0)[:, None], (self.block, self.block))

    def _by_block(self, x: Tensor) -> Tensor:
        """(h, N) -> (h, blocks)."""
        return torch.nn.functional.pad(x, (0, -x.shape[-1] % self.block)).unflatten(-1, (-1, self.block)).sum(-1)

    @staticmethod
    def _forced(scores: Tensor) -> Tensor:
        first = torch.arange(len(scores), device=scores.device) == 0
        return scores.masked_fill(first, torch.inf)

    @staticmethod
    def _guess(last: Tensor, keys: Tensor, there: Tensor, scale: float) -> Tensor:
        """softmax of mean(q_last) . mean(k) over blocks, (h, blocks)."""
        logits = torch.einsum("hd,nhd->hn", last.double().mean(0), keys) * scale
        return torch.softmax(logits.masked_fill(~there, -torch.inf), -1)

    def _pooled(self, queries: Tensor, keys: Tensor, asked: Tensor, there: Tensor, scale: float) -> Tensor:
        """The largest tiles of one head's pooled attention that stay within gamma of it, bool (m, n)."""
        m = torch.arange(len(there), device=keys.device)
        hidden = (m > m[:, None]) | ~there
        weights = torch.softmax((queries @ keys.T * scale).masked_fill(hidden, -torch.inf), -1).nan_to_num(0.0)
        weights = (weights * asked[:, None] / asked.sum()).flatten()
        return largest(weights, int(within_share(weights, self.gamma))).view(len(m), len(m))


def distance(a: Tensor, b: Tensor) -> Tensor:
    """The square root of the Jensen-Shannon divergence in nats of distributions over the last dim."""
    middle = (a + b) / 2
    parts = [torch.xlogy(x, x / middle.clamp(min=1e-300)).sum(-1) for x in (a, b)]
    return ((parts[0] + parts[1]) / 2).clamp(min=0).sqrt()
