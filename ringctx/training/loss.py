"""Losses over all ranks: the mean over all labels, and what keys that are not forgotten cost.

Knows how to ask all ranks. Knows nothing of data. The convention of gradients is in the package's head.
Letters: b sequences, s tokens on this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ringctx.core.header import share
from ringctx.core.layout import Layout
from ringctx.core.ring import Ring
from ringctx.errors import Unsupported
from ringctx.kernels.base import accumulation_dtype
from ringctx.training.labels import IGNORED

Gather = Callable[[Tensor], list[Tensor]]
"""The tensors (n) of all ranks, in their order."""


def token_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum of -log p over these labels, already shifted; logits (b s vocabulary), labels (b s). 0 where none counts.

    Of the size of the logits it makes their gradient alone, in their dtype; sums are in the accumulation dtype.
    """
    found: Tensor = _TokenSum.apply(logits.flatten(0, 1), labels.flatten())
    return found


AT_ONCE = 2**22
"""Logits whose probabilities exist at a time beside them."""


def _pieces(x: Tensor, vocabulary: int) -> tuple[Tensor, ...]:
    """So many rows of x as have about AT_ONCE logits."""
    return x.split(max(1, AT_ONCE // vocabulary))


class _TokenSum(torch.autograd.Function):
    """d/dlogits = p - 1 at the label, in rows that have one."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        wide = accumulation_dtype(logits.dtype)
        parts = [x.to(wide).logsumexp(-1) for x in _pieces(logits, logits.shape[1])]
        lse = torch.cat(parts) if parts else logits.new_zeros(0, dtype=wide)
        counts = labels != IGNORED
        picked = logits.gather(-1, labels.clamp(min=0)[:, None])[:, 0].to(wide) if len(labels) else lse
        ctx.save_for_backward(logits, labels, lse)
        return (lse - picked).where(counts, 0.0).sum()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        if torch.is_grad_enabled():
            raise Unsupported("The gradient of the loss has no gradient of its own; leave out create_graph=True.")
        logits, labels, lse = ctx.saved_tensors
        grad = torch.empty_like(logits)
        for rows, x, label, one in zip(*(_pieces(y, logits.shape[1]) for y in (grad, logits, labels, lse)), strict=True):
            p = (x.to(one.dtype) - one[:, None]).exp_()
            p[torch.arange(len(label), device=label.device), label.clamp(min=0)] -= 1
            rows.copy_(p.mul_((slope * (label != IGNORED))[:, None]))
        return grad, None


@torch.compiler.disable(reason="ranks send each other what they counted")
def mean_of(total: Tensor, count: Tensor, gather: Gather) -> Tensor:
    """The mean over all ranks' labels: the sum of their totals over the sum of their counts; the same number on every rank.

    Its gradient is this rank's share times the number of ranks. All ranks must call it together.
    """
    found: Tensor = _Mean.apply(total, count, gather)
    return found


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, total: Tensor, count: Tensor, gather: Gather) -> Tensor:
        everyone = gather(torch.stack((total.detach().double(), count.double())))
        total_of_all, labels = torch.stack(everyone).sum(0)
        ctx.weight = len(everyone) / labels.clamp(min=1)
        return (total_of_all / labels.clamp(min=1)).to(total.dtype)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        return (slope * ctx.weight).to(slope.dtype), None, None


def memory_loss(memories: Mapping[int, Tensor], layout: Layout, ring: Ring, gather: Gather) -> Tensor:
    """The sum over layers and sequences of max_i M_i, over layers and tokens, with `mean_of`'s gradient: what eps multiplies.

    memories: of each layer with a carry (b s), how many earlier keys each query has not forgotten. The largest row of a sequence
    may lie on any rank; its owner alone, the one of the lower index among equals, has the loss and its gradient.
    Source: Leviathan, Kalman & Matias 2024 (Selective Attention, arXiv 2410.02703), the memory loss, as two independent
    implementations have it: L = L_ppl + eps sum_l max_i M / (layers tokens).
    """
    indices = layout.indices(ring.rank)
    stacked = torch.stack([memories[layer][:, : len(indices)] for layer in sorted(memories)])  # (layers b s)
    layers, b, _ = stacked.shape
    if len(indices):
        ascending = indices.argsort()
        found = stacked.detach()[..., ascending].max(-1)
        best, place = found.values, ascending[found.indices]
        where = indices[place].to(best.dtype)
    else:
        best, where = torch.full((layers, b), -torch.inf, dtype=stacked.dtype), torch.full((layers, b), torch.inf, dtype=stacked.dtype)
    everyone = share(ring, torch.stack((best, where)).double(), "memory") if ring.size > 1 else [torch.stack((best, where)).double()]
    values, owners = torch.stack([x[0] for x in everyone]), torch.stack([x[1] for x in everyone])  # (ranks layers b)
    first = owners.masked_fill(values < values.max(0).values, torch.inf).argmin(0)
    mine = stacked.gather(-1, place[..., None])[..., 0] * (first == ring.rank) if len(indices) else stacked
    return mean_of(mine.sum(), mine.new_tensor(layers * b * len(indices)), gather)
