"""Gathered: rows of every rank on every rank, through which gradients flow back to the ranks that own them.

For small things that all ranks need: summaries of blocks, states, an indexer's keys. Attention's own keys travel by plans instead.
Knows rings and layouts. Knows nothing of what rows mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ringctx.core.header import share
from ringctx.core.layout import Layout
from ringctx.core.ring import Message, Ring


def gathered(ring: Ring, x: Tensor, kind: str, rows: Sequence[int]) -> Tensor:
    """x (n ...), of which rank r has rows[r] -> (sum of rows ...), in rank order, equal on every rank. All ranks call it together.

    Backward, which all ranks must run too, gives each rank the sum of what all ranks' losses say of its rows. kind: as counted.
    """
    found: Tensor = _Gather.apply(x, ring, kind, list(rows))
    return found


def whole(ring: Ring, x: Tensor, layout: Layout, kind: str) -> tuple[Tensor, Tensor]:
    """x (n ...) of this rank's tokens -> those of all ranks, ascending by index, and the indices, int64 on the CPU. Differentiable."""
    parts = [layout.indices(r) for r in range(layout.size)]
    indices, order = torch.cat(parts).sort()
    return gathered(ring, x, kind, [len(part) for part in parts])[order.to(x.device)], indices


def traded(ring: Ring, parts: Sequence[Tensor], like: Sequence[Tensor], kind: str, *, grads: bool = False) -> list[Tensor]:
    """Part r goes to rank r -> what came from each rank, in rank order, shaped as `like`; one's own part stays. All ranks together."""
    sent = [part.contiguous() for part in parts]
    got = [sent[r] if r == ring.rank else torch.empty_like(x, memory_format=torch.contiguous_format) for r, x in enumerate(like)]
    others = [(ring.rank + n) % ring.size for n in range(1, ring.size)]
    receive, send = ([Message(r, (some[r],)) for r in others] for some in (got, sent))
    ring.exchange(kind, f"{'gradients of ' * grads}the {kind}", receive, send, grads=grads).wait()
    return got


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ring: Ring, kind: str, rows: list[int]) -> Tensor:
        ctx.ring, ctx.kind, ctx.rows = ring, kind, rows
        return torch.cat(share(ring, x, kind, rows))

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None, None, None]:
        ring, parts = ctx.ring, dx.split(ctx.rows)
        said = traded(ring, parts, [parts[ring.rank]] * ring.size, ctx.kind, grads=True)
        return sum(said[1:], said[0]), None, None, None
