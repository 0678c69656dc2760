"""APB, accelerated long-context attention by passing blocks: of each block, the keys worth most go to all later blocks, and no others.

A token of the context sees the first `anchor` tokens, of each earlier block the `passing` keys with the largest scores, and its own block;
tokens after the context see all. Which keys are worth it, a small network says of each key by itself, before anything travels.
Source: Huang et al. 2025 (APB, arXiv 2502.12085), section 3; retaining heads: Huang et al. 2024 (Locret, arXiv 2410.01805), section 3.
The paper's anchor begins with the question: put it before the document too. A ring exchanges scores, then the anchor and passing keys.
Letters: b batch, s queries here, n keys here, h query heads, g key heads, d key width, e value width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ringctx.core.attention import Attention, Encoding
from ringctx.core.gathered import whole
from ringctx.core.layout import Layout
from ringctx.core.lines import Lines
from ringctx.core.pattern import Pattern, group_heads
from ringctx.core.ring import Ring
from ringctx.core.rules import PerHead
from ringctx.errors import Unsupported
from ringctx.methods.selectors.summaries import KIND, at_least_one, largest
from ringctx.methods.sighted import Chosen, attend, sight_at
from ringctx.patterns import own_block, queries_from, sinks


class RetainingHead(nn.Module):
    """What each key head's keys are worth: q (b s h d), k (b s g d), v (b s g e), not encoded -> (b s g). Trained apart from the model."""

    def __init__(self, heads: int, key_heads: int, key_width: int, value_width: int, hidden: int = 1024) -> None:
        super().__init__()
        width = heads * key_width + key_heads * (key_width + value_width)
        self.inward, self.outward = nn.Linear(width, hidden), nn.Linear(hidden, key_heads)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Of tokens alone; no ranks take part."""
        found: Tensor = self.outward(nn.functional.gelu(self.inward(torch.cat([x.flatten(2) for x in (q, k, v)], -1))))
        return found


@dataclass(frozen=True)
class PassingBlocks:
    """block: tokens of one, a rank's share in the paper. context: tokens that are read so. Raises ConfigError for numbers below 1."""

    block: int
    anchor: int
    passing: int
    context: int

    def __post_init__(self) -> None:
        at_least_one("PassingBlocks", block=self.block, anchor=self.anchor, passing=self.passing, context=self.context)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scores: Tensor,
        *,
        ring: Ring,
        layout: Layout | None,
        key_layout: Layout | None = None,
        encoding: Encoding | None = None,
    ) -> Tensor:
        """q (b s h d), k (b n g d), v (b n g e), scores (b n g) of these keys -> (b s h e). All ranks together; gradients reach no score.

        layout: as in ring_attention; None while decoding, when every rank holds the newest tokens, the last of key_layout.
        """
        sight = sight_at(self, q, k, v, ring=ring, layout=layout, key_layout=key_layout)
        group, found = q.shape[2] // k.shape[2], []
        for n in range(len(q)):
            pattern = self.pattern(scores[n].detach(), group, ring, sight.key_layout)
            attention = Attention(select=Chosen(pattern), encoding=encoding)
            found.append(attend(sight, attention, *(x[n : n + 1] for x in (q, k, v))))
        return torch.cat(found)

    def pattern(self, scores: Tensor, group: int, ring: Ring, layout: Layout) -> Pattern:
        """Which earlier keys are seen, by scores (n g) of this rank's keys, for `group` query heads a key head; the same on every rank."""
        every, indices = whole(ring, scores.float(), layout, KIND)
        if bool(every.isnan().any()):
            raise Unsupported("A retaining head gave a score that is not a number; look at its weights, or at what it was fed.")
        inside = every[: int(torch.searchsorted(indices, self.context))]
        columns: list[list[int]] = [[] for _ in range(scores.shape[1])]
        of_block = (indices[: len(inside)] // self.block).to(every.device)
        for block in of_block.unique().tolist():
            at = (of_block == block).nonzero()[:, 0]
            for head, kept in enumerate(largest(inside[at].T, self.passing)):
                columns[head] += indices[at[kept].cpu()].tolist()
        of_heads = ((range(n * group, (n + 1) * group), Lines(tuple(passed), ())) for n, passed in enumerate(columns))
        passing = PerHead(group_heads((list(heads), lines) for heads, lines in of_heads))
        return sinks(self.anchor) | own_block(self.block) | passing | queries_from(self.context)
