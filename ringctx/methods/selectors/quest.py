"""Quest: pages of the cache by an upper bound of what a query may find in them.

Source: arXiv 2406.10774 and its code. Letters: t new tokens, h heads, g key heads, d width, p pages.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ringctx.core.pattern import Pattern
from ringctx.core.select import Sight
from ringctx.methods.selectors.summaries import at_least_one, block_bounds, largest, rows_seen


@dataclass(frozen=True)
class Quest:
    """While decoding, per head and new token: the `pages` pages of `page` keys with the greatest bound; prefill stays dense.

    The bound on q . k over a page: sum over channels of max(q_c min_c, q_c max_c), with each channel's least and greatest key of the
    page. Pages that begin after the query are not seen; no page is forced. Bounds travel, 2 d numbers a page and key head. They are
    taken anew at each token, so what is saved is attention to values and not the reading of keys. Raises ConfigError.
    """

    pages: int = 64
    page: int = 16
    prefill = False
    decode = True
    trains = False

    def __post_init__(self) -> None:
        at_least_one("Quest", pages=self.pages, page=self.page)

    def select(self, q: Tensor, k: Tensor, sight: Sight) -> Pattern:
        bounds = block_bounds(sight.ring, torch.cat((k, -k), -1), sight.key_layout, self.page, sight.length).double()
        greatest, least = bounds[..., : k.shape[-1]], -bounds[..., k.shape[-1] :]
        ratio, there = q.shape[1] // k.shape[1], ~greatest[:, 0, 0].isneginf()
        queries = sight.layout.indices(0, q.device)
        mask = torch.zeros(q.shape[1], len(queries), len(there), dtype=torch.bool, device=q.device)
        seen = there & (torch.arange(len(there), device=q.device) * self.page <= queries[:, None])
        for head in range(q.shape[1]):
            low, high = least[there, head // ratio], greatest[there, head // ratio]
            query = q[:, head].double()
            scores = query.new_full((len(queries), len(there)), -torch.inf)
            scores[:, there] = query.clamp(min=0) @ high.T + query.clamp(max=0) @ low.T
            mask[head] = largest(scores.masked_fill(~seen, -torch.inf), self.pages)
        return rows_seen(mask, int(queries[0]), sight.length, self.page)
