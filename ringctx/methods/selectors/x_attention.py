"""XAttention: the sum along the antidiagonals of small cells stands for the attention of a block.

Source: arXiv 2503.16428 and its code. Letters: S stride, B block, h heads, g key heads, d width, c cells of S tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ringctx.core.layout import Layout
from ringctx.core.pattern import Pattern
from ringctx.core.select import Sight
from ringctx.errors import ConfigError
from ringctx.methods.selectors.summaries import at_least_one, collect, num_blocks, regroup, shared_bits, tiles_seen


@dataclass(frozen=True)
class XAttention:
    """Per head and block of queries: the key blocks whose cells hold `threshold` of the row's antidiagonal attention.

    Cell products: sum over a < S of q[S x + S - 1 - a] . k[S y + a], scaled by scale / S; causal softmax over cells y <= x; the sum
    over a block's cells is its score. The first block and the diagonal one are kept, then the largest until threshold of the row's
    total is reached. Absent tokens of a cell are zero.
    The keys of one key head at a time are gathered on every rank, and each rank scores whole blocks of queries in turn.
    Raises ConfigError.
    """

    threshold: float = 0.9
    stride: int = 8
    block: int = 128
    prefill = True
    decode = False
    trains = False

    def __post_init__(self) -> None:
        at_least_one("XAttention", stride=self.stride, block=self.block)
        if self.block % self.stride or not 0 < self.threshold <= 1:
            given = f"a block of {self.block}, a stride of {self.stride} and a threshold of {self.threshold}"
            raise ConfigError(f"XAttention was given {given}; the stride must divide the block, and 0 < threshold <= 1.")

    def select(self, q: Tensor, k: Tensor, sight: Sight) -> Pattern:
        ring, blocks = sight.ring, num_blocks(sight.length, self.block)
        asked = torch.cat([sight.layout.indices(r) for r in range(ring.size)]).div(self.block, rounding_mode="floor").unique()
        dealt = [asked[r :: ring.size] for r in range(ring.size)]
        whole = Layout(tuple(tuple(range(m * self.block, (m + 1) * self.block) for m in some.tolist()) for some in dealt))
        queries = regroup(ring, q, sight.layout, whole)
        mine = torch.zeros(len(dealt[ring.rank]), q.shape[1], blocks, dtype=torch.bool, device=q.device)
        everything, ratio = torch.arange(blocks * self.block), q.shape[1] // k.shape[1]
        held = torch.cat([sight.key_layout.indices(r) for r in range(ring.size)])
        absent = ~torch.isin(torch.arange(blocks * self.block // self.stride), held // self.stride)
        for head in range(k.shape[1]):
            keys = self._cells(collect(ring, k[:, head], sight.key_layout, everything))
            for group in range(head * ratio, (head + 1) * ratio):
                for row, m in enumerate(dealt[ring.rank].tolist()):
                    cells = self._cells(queries[row * self.block : (row + 1) * self.block, group].flip(0)).flip(0)
                    mine[row, group] = self._row(cells, keys, m, absent.to(q.device), sight.scale)
        mask = torch.zeros(q.shape[1], blocks, blocks, dtype=torch.bool, device=q.device)
        for rows, part in zip(dealt, shared_bits(ring, mine, [len(x) for x in dealt]), strict=True):
            mask[:, rows.to(q.device)] = part.transpose(0, 1).to(q.device)
        return tiles_seen(mask, (self.block, self.block))

    def _cells(self, x: Tensor) -> Tensor:
        """Tokens (c S, d) -> cells (c, S d)."""
        return x.double().reshape(-1, self.stride * x.shape[-1])

    def _row(self, cells: Tensor, keys: Tensor, m: int, absent: Tensor, scale: float) -> Tensor:
        """The key blocks, bool (blocks,), that block m of queries keeps; cells (B / S, S d), keys (c, S d)."""
        each = self.block // self.stride
        x, y = torch.arange(m * each, (m + 1) * each, device=keys.device), torch.arange(len(keys), device=keys.device)
        logits = (cells @ keys.T * (scale / self.stride)).masked_fill((y > x[:, None]) | absent, -torch.inf)
        scores = torch.softmax(logits, -1).nan_to_num(0.0).view(each, -1, each).sum((0, 2))
        n = torch.arange(len(scores), device=keys.device)
        forced = (n == 0) | (n == m)
        order = scores.float().masked_fill(forced, torch.inf).sort(descending=True, stable=True).indices
        before = scores[order].cumsum(0) - scores[order]
        kept = torch.zeros_like(forced)
        kept[order] = before.float() < float(torch.tensor(self.threshold * scores.sum().item()).float())
        return (kept | forced) & (n <= m)
