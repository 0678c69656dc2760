"""The choice over the ring: each key head keeps its best keys, wherever they live.

Each rank sends its best `budget` or its worst `excess` scores, whichever are fewer, with their indices: among them lies the
last that is kept or the first that is dropped, so every rank knows what its own keys must beat.
Letters: b batch, f key heads, n slots on this rank, N candidates of all ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ringctx.core.header import share
from ringctx.core.ring import Ring
from ringctx.methods.eviction.policy import FAR, gather


def keep(ring: Ring, scores: Tensor, indices: Tensor, budget: int) -> tuple[Tensor, Tensor, bool]:
    """Which of this rank's slots are kept, bool (b f n), how many keys each head keeps on all ranks, int64 (b f), and
    whether any rank drops any key.

    scores (b f n), higher is kept, +inf is kept and -inf dropped whatever the budget, NaN is the lowest else; indices (b f n), -1
    where a slot is empty.
    Ties go to the lower index, so the kept set is the same on any number of ranks and in any layout. All ranks must call it together.
    """
    filled = indices >= 0
    scores = scores.double().nan_to_num(torch.finfo(torch.float64).min, torch.inf, -torch.inf)
    counts = torch.stack((filled.sum(-1), (filled & scores.isposinf()).sum(-1), (filled & ~scores.isneginf()).sum(-1)))
    counts = torch.stack(share(ring, counts, "scores")).sum(0) if ring.size > 1 else counts
    number = counts[1].clamp(min=budget).minimum(counts[2])  # of keys that are kept
    excess = counts[0] - number
    if not bool(excess.any()):
        return filled, number, False
    name_losers = int(excess.max()) < int(number.max())
    fill = torch.inf if name_losers else -torch.inf  # empty slots must be no candidates
    scores, indices = scores.where(filled, fill), indices.where(filled, FAR)
    order = _best_first(scores, indices)
    order = order[..., -int(excess.max()) :] if name_losers else order[..., : int(number.max())]
    named = torch.stack((scores.gather(-1, order), indices.gather(-1, order).view(torch.float64)))
    everyone = gather(ring, named)
    theirs, at = everyone[0].contiguous(), everyone[1].contiguous().view(torch.int64)
    order = _best_first(theirs, at)
    place = theirs.shape[-1] - excess if name_losers else number - 1
    edge = order.gather(-1, place.clamp(0, theirs.shape[-1] - 1).unsqueeze(-1))
    score, index = theirs.gather(-1, edge), at.gather(-1, edge)
    if name_losers:
        kept = (scores > score) | ((scores == score) & (indices < index)) | (excess == 0).unsqueeze(-1)
    else:
        kept = ((scores > score) | ((scores == score) & (indices <= index))) & (number > 0).unsqueeze(-1)
    return kept & filled, number, True


def _best_first(scores: Tensor, indices: Tensor) -> Tensor:
    """The order (b f n) of descending scores, the lower index first among equals."""
    by_index = indices.argsort(dim=-1, stable=True)
    return by_index.gather(-1, scores.gather(-1, by_index).argsort(dim=-1, descending=True, stable=True))


def parted(number: Tensor) -> list[list[int]]:
    """Heads that keep equally many keys, number (b f), go on together: their places, in groups; slots that pad would be waste."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for head, counts in enumerate(number.T.tolist()):
        groups.setdefault(tuple(counts), []).append(head)
    return list(groups.values())
