"""decode_attention: few queries, equal on every rank, against keys that stay where they are; one small exchange.

Source: Shyam et al. 2024 (tree attention): partials merge by lse, so only (out, lse) travels, h (e + 1) numbers a token.
Letters: b batch, n_q new tokens, n cached tokens here, h query heads, g key heads, d key width, e value width.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ringctx.core.attention import Attention
from ringctx.core.compute import HeadGroup, Work, head_groups
from ringctx.core.header import share
from ringctx.core.layout import Layout, Ranges
from ringctx.core.partial import Partial
from ringctx.core.pattern import FULL, Full
from ringctx.core.ring import Ring
from ringctx.core.tiles import tiles as tiles_of
from ringctx.errors import LayoutError, RanksDisagree, Unsupported

_DEFAULT = Attention()
HEADER = 2  # numbers before the partial: the call's number, and a checksum of what must be equal on all ranks


def decode_attention(q: Tensor, k: Tensor, v: Tensor, *, key_layout: Layout, ring: Ring, attention: Attention = _DEFAULT) -> Tensor:
    """Attention of the newest tokens over a cache that is spread over the ring. All ranks must call this together.

    q (b n_q h d), equal on every rank, the last n_q indices of key_layout; k (b n g d), v (b n g e), this rank's share
      -> out (b n_q h e) in q's dtype, bitwise equal on every rank.
    No backward: it is for inference. Raises LayoutError, Unsupported, RanksDisagree, RankLost.
    """
    _check(q, k, v, key_layout, ring, attention)
    queries: Ranges = (range(key_layout.length - q.shape[1], key_layout.length),)
    keys = key_layout.spans[ring.rank]
    if attention.encoding is not None:
        q = attention.encoding.queries(q, torch.arange(queries[0].start, queries[0].stop, device=q.device))
        k = attention.encoding.keys(k, key_layout.indices(ring.rank, k.device))
    with torch.no_grad():
        groups = head_groups(attention.pattern, q.shape[2], k.shape[2])
        work = Work(attention, groups, [p.detach() for p in attention.params()], "auto", 0, 0)
        totals = work.empty(q, v.shape[3])
        if keys:
            _attend(work, totals, groups, q, queries, k, v, keys)
        for total, parts in zip(totals, _reduce(ring, totals, _fingerprint(q, key_layout, attention)), strict=True):
            total.out, total.lse = parts.out, parts.lse
        return work.whole(totals, q, v.shape[3])[0]


def _check(q: Tensor, k: Tensor, v: Tensor, key_layout: Layout, ring: Ring, attention: Attention) -> None:
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise Unsupported("decode_attention has no backward; call it under torch.no_grad(), or train with ring_attention.")
    if attention.dropout:
        raise Unsupported("decode_attention drops nothing; pass an attention with dropout=0.0.")
    if key_layout.size != ring.size:
        raise LayoutError(f"The ring has {ring.size} ranks, but the key layout has {key_layout.size}; make it for {ring.size}.")
    have, want = (k.shape[1], v.shape[1]), key_layout.count(ring.rank)
    if have != (want, want):
        raise LayoutError(f"k and v have {have[0]} and {have[1]} tokens, but the layout gives rank {ring.rank} {want}.")
    if q.shape[1] > key_layout.length:
        raise LayoutError(f"q has {q.shape[1]} tokens, but the key layout ends at {key_layout.length}; append the new tokens to it first.")


def _attend(
    work: Work, totals: list[Partial], groups: Sequence[HeadGroup], q: Tensor, queries: Ranges, k: Tensor, v: Tensor, keys: Ranges
) -> None:
    """Attend to this rank's keys. A new token that sees all of them is folded: its heads of one key head become its rows."""
    tiles = [tiles_of(g.pattern, queries, keys) for g in groups]
    ratio = q.shape[2] // k.shape[2]
    plain = not work.attention.additive and len(groups) == 1 and q.shape[1] == 1 and ratio > 1
    if plain and [t[0] for t in tiles[0]] == [FULL]:
        _, _, _, c, d = tiles[0][0]
        folded = q.view(q.shape[0], k.shape[2], ratio, q.shape[3]).transpose(1, 2)  # (b, ratio, g, d)
        whole = tuple(range(k.shape[2]))
        alike = Work(work.attention, (HeadGroup(whole, whole, whole, Full()),), work.params, "auto", 0, 0)
        part = alike.empty(folded, v.shape[3])
        alike.forward(part, [((int(FULL), 0, ratio, 0, d - c),)], folded, (range(ratio),), k[:, c:d], v[:, c:d], keys)
        shape = (q.shape[0], 1, q.shape[2])
        totals[0].merge_(part[0].out.transpose(1, 2).reshape(*shape, -1), part[0].lse.transpose(1, 2).reshape(shape))
        return
    work.forward(totals, tiles, q, queries, k, v, keys)


def _fingerprint(q: Tensor, key_layout: Layout, attention: Attention) -> int:
    """A checksum of everything that must be equal on all ranks."""
    return zlib.crc32(repr((tuple(q.shape), str(q.dtype), hash(key_layout), str(attention))).encode())


def _reduce(ring: Ring, totals: list[Partial], fingerprint: int) -> list[Partial]:
    """All ranks' partials, merged in rank order, so that every rank gets the same bits."""
    if ring.size == 1:
        return totals
    ring.calls += 1
    head = totals[0].lse.new_tensor([ring.calls % 2**20, fingerprint % 2**20])
    flat = torch.cat([head, *(x.reshape(-1) for t in totals for x in (t.out, t.lse))])
    # a partial of another size can never match this tag, so it ends in a deadline instead of overrunning a buffer
    everyone = share(ring, flat, "partials", tag=1 + flat.numel() % 2**29)
    merged = [Partial.empty(tuple(t.out.shape), t.out.dtype, t.out.device) for t in totals]  # type: ignore[arg-type]
    for rank, theirs in enumerate(everyone):
        if not torch.equal(theirs[:HEADER].cpu(), head.cpu()):
            other, own = (f"call {int(x[0])} with fingerprint {int(x[1])}" for x in (theirs, head))
            raise RanksDisagree(
                f"Ranks disagree: rank {rank} decodes {other}, rank {ring.rank} {own}. "
                "All ranks must call decode_attention with the same layout and attention, in the same order."
            )
        at = HEADER
        for total in merged:
            out = theirs[at : at + total.out.numel()].view_as(total.out)
            at += total.out.numel()
            total.merge_(out, theirs[at : at + total.lse.numel()].view_as(total.lse))
            at += total.lse.numel()
    return merged
