"""MoBA's gate: each query and head sees the blocks whose mean key it agrees with most, its own among them.

Source: arXiv 2502.13189 and its code. Letters: s queries here, h heads, g key heads, d width, n key blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ringctx.core.pattern import Pattern
from ringctx.core.select import Sight
from ringctx.methods.selectors.summaries import at_least_one, block_means, chosen, largest


@dataclass(frozen=True)
class Moba:
    """Per head and query: `blocks` blocks of keys, its own always and counted, the others by q . mean(k) among those before it.

    A row of bits for each query and head travels, one bit a key block. Models are trained with it, as in the
    paper: the gate has no gradient. Raises ConfigError.
    """

    blocks: int = 12
    block: int = 4096
    prefill = True
    decode = True
    trains = True

    def __post_init__(self) -> None:
        at_least_one("Moba", blocks=self.blocks, block=self.block)

    def select(self, q: Tensor, k: Tensor, sight: Sight) -> Pattern:
        means, counts = block_means(sight.ring, k, sight.key_layout, self.block, sight.length)
        means = means.repeat_interleave(q.shape[1] // k.shape[1], 1)
        queries = sight.layout.indices(0 if sight.decoding else sight.ring.rank, q.device)
        scores = torch.einsum("shd,nhd->shn", q.double(), means)
        n, own = torch.arange(len(means), device=q.device), (queries // self.block)[:, None, None]
        scores = scores.masked_fill((n > own) | (counts == 0), -torch.inf).masked_fill(n == own, torch.inf)
        return chosen(sight, largest(scores, self.blocks), self.block)
