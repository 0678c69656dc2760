"""The ring: keys visit, tiles are attended, partials merge; in backward, gradients go home with the keys they belong to.

Source: Liu, Zaharia & Abbeel 2023 (ring attention, blockwise online softmax); backward as in FlashAttention-2 with the
whole row's lse and out, so that every tile stands alone and tiles may come in any order.
Letters: b batch, s query tokens here, n key tokens here, h query heads, g key heads, d key width, e value width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ringctx.core.compute import Work
from ringctx.core.layout import Ranges
from ringctx.core.plan import Plan, Visit, steps_of
from ringctx.core.ring import Ring
from ringctx.core.sums import Sum
from ringctx.core.tiles import Tile, area, cut_rows, width
from ringctx.core.transport import Homeward, visits
from ringctx.kernels.base import accumulation_dtype

STEP_BYTES = 8 * 2**20
"""Gradients of a visiting block leave in parts of this size or more: they hide then under what is left of the visit."""


def forward(work: Work, plan: Plan, ring: Ring, queries: Ranges, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """out (b s h e) in q's dtype and lse (b s h) for this rank's queries over all keys of the ring."""
    totals = work.empty(q, v.shape[3])
    for _, present in visits(plan, ring, (k, v)):
        while present:  # emptied, so that no block outlives its hop
            visit, block = present.pop(0)
            work.forward(totals, visit.tiles, q, queries, block[0], block[1], visit.ranges)
            del block
    return work.whole(totals, q, v.shape[3])


def backward(
    work: Work,
    plan: Plan,
    ring: Ring,
    queries: Ranges,
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
) -> tuple[Sum, Sum, Sum]:
    """dq (b s h d), dk (b n g d), dv (b n g e) as sums; the params' gradients are left in work.

    Home tiles are computed in two parts, so that the first keys and the last gradients travel under work, each as long as its messages;
    a large visit in steps, so that most of its gradients travel under the rest of it.
    """
    rows = (dout.to(q.dtype), q, out, lse.masked_fill(lse == -torch.inf, 0.0), dlse)
    dq, dk, dv = Sum(q), Sum(k), Sum(v)
    item, wide = k.dtype.itemsize, accumulation_dtype(k.dtype).itemsize
    least = least_tokens(wide * k.shape[0] * k.shape[2] * (k.shape[3] + v.shape[3]))  # the same on ranks that hold no key
    steps = [steps_of(hop, least) for hop in plan.hops]
    first, second = divided(plan.home, early(item, wide, len(steps[-1]))) if steps else (plan.home.tiles, None)
    homeward = Homeward(plan, ring, (dk, dv))
    for number, present in visits(plan, ring, (k, v)):
        if number == 0:
            work.backward((dq, dk, dv), first, rows, queries, k, v, plan.home.ranges)
            continue
        left = {visit.owner: block for visit, block in present}
        present.clear()
        for step in steps[number - 1]:
            done = []
            for visit in step.visits:
                block, left[visit.owner] = _divided_at(width(visit.spans), left.pop(visit.owner))
                grads = Sum(block[0]), Sum(block[1])
                work.backward((dq, *grads), visit.tiles, rows, queries, block[0], block[1], visit.ranges)
                done.append((visit, grads))
                del block
            homeward.step(number, step.grads_receive, done, ahead=len(steps[number - 1]))
        left.clear()
    if second is not None:
        work.backward((dq, dk, dv), second, rows, queries, k, v, plan.home.ranges)
    homeward.finish()
    return dq, dk, dv


def early(keys: float, grads: float, last_steps: int) -> float:
    """The share of home that is computed before the first hop of backward: as keys' bytes are to those of keys and of the gradients that
    leave last, of so many steps. keys, grads: bytes of a token, or of a number."""
    return keys / (keys + grads / max(last_steps, 1))


def least_tokens(grads: float) -> int:
    """Tokens of a step at least. grads: bytes of a token's dk and dv."""
    return max(int(STEP_BYTES // max(grads, 1)), 1)


def _divided_at(tokens: int, block: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    return tuple(x[:, :tokens] for x in block), tuple(x[:, tokens:] for x in block)


def divided(home: Visit, share: float) -> tuple[tuple[tuple[Tile, ...], ...], tuple[tuple[Tile, ...], ...]]:
    """The tiles of each head group in two parts, the first of about this share of the work, and of one tile at least: gradients that come
    home are added to what is there.
    """
    parts = []
    for rows in home.tiles:
        left, first, second = share * area(rows), list[Tile](), list[Tile]()
        for tile in rows:
            above, below = cut_rows(tile, max(left, 0.0))
            first += above
            second += below
            left -= area(tuple(above))
        if not first:
            first, second = second[:1], second[1:]
        parts.append((tuple(first), tuple(second)))
    return tuple(a for a, _ in parts), tuple(b for _, b in parts)
