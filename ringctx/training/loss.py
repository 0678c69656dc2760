"""Losses over the ring: the mean over all labels, and what keys that are not forgotten cost.

Knows the ring. Knows nothing of data. The convention of gradients is in the package's head.
Letters: b sequences, s tokens on this rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy

from ringctx.core.header import share
from ringctx.core.layout import Layout
from ringctx.core.ring import Ring
from ringctx.kernels.base import accumulation_dtype
from ringctx.training.batch import IGNORED, Batch


def token_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum of -log p over these labels, already shifted; logits (b s vocabulary), labels (b s). 0 where none counts."""
    logits = logits.to(accumulation_dtype(logits.dtype))
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")


def token_loss(logits: Tensor, batch: Batch) -> Tensor:
    """This rank's part of the mean of -log p over all labels of the batch; logits (b s vocabulary)."""
    return token_sum(logits, batch.labels) / max(batch.count, 1)


def mean_over(group: dist.ProcessGroup | None, total: Tensor, count: Tensor) -> Tensor:
    """The mean over all ranks' labels: the sum of their totals over the sum of their counts; the same number on every rank.

    Its gradient is this rank's share times the number of ranks: what an engine must be given that averages over all of them.
    All ranks of the group (None: this one alone) must call it together.
    """
    found: Tensor = _Mean.apply(total, count, group)
    return found


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, total: Tensor, count: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        both = torch.stack((total.detach().double(), count.double()))
        if group is not None:
            dist.all_reduce(both, group=group)
        labels = both[1].clamp(min=1)
        ctx.weight = (1 if group is None else dist.get_world_size(group)) / labels
        return (both[0] / labels).to(total.dtype)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        return (slope * ctx.weight).to(slope.dtype), None, None


def memory_loss(memories: Mapping[int, Tensor], layout: Layout, ring: Ring) -> Tensor:
    """This rank's part of sum over layers and sequences of max_i M_i, over layers and tokens: what eps multiplies.

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
    scale = layers * b * layout.length
    if not len(indices):
        return stacked.sum() / scale
    mine = stacked.gather(-1, place[..., None])[..., 0]
    return (mine * (first == ring.rank)).sum() / scale
