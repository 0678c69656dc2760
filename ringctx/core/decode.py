"""decode_attention: few queries, equal on every rank, against keys that stay where they are; one small exchange.

Source: Shyam et al. 2024 (tree attention): partials merge by lse, so only (out, lse) travels, h (e + 1) numbers a token.
Letters: b batch, n_q new tokens, n cached tokens here, h query heads, g key heads, d key width, e value width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ringctx.core.attention import Attention, finished
from ringctx.core.call import Call, start_problem
from ringctx.core.carried import CarriedWork, Meeting, strips
from ringctx.core.carry import Chunk, carry_problem
from ringctx.core.compute import Encoded, HeadGroup, Work, head_groups
from ringctx.core.explicit import Keys
from ringctx.core.forgetting import attend_forgetting_here
from ringctx.core.header import agree, share
from ringctx.core.layout import Layout, Ranges
from ringctx.core.partial import Partial
from ringctx.core.pattern import FULL, Full
from ringctx.core.ring import Ring
from ringctx.core.select import narrowed, select_problem, sight_of
from ringctx.core.tiles import Tile
from ringctx.core.tiles import tiles as tiles_of
from ringctx.core.visiting import attend_here, check, empty, encoded, whole
from ringctx.errors import ConfigError, LayoutError, RingctxError, Unsupported

_DEFAULT = Attention()


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_layout: Layout,
    ring: Ring,
    attention: Attention = _DEFAULT,
    key_indices: Tensor | None = None,
    carry: Tensor | None = None,
) -> Tensor:
    """Attention of the newest tokens over a cache that is spread over the ring. All ranks must call this together.

    q (b n_q h d), equal on every rank, the last n_q indices of key_layout; k (b n g d), v (b n g e), this rank's share
      -> out (b n_q h e) in q's dtype, bitwise equal on every rank.
    key_indices: after eviction, which token each slot of k and v holds, int64 (b g n), -1 where a slot is empty; then n may be
    anything, and key_layout only says where the sequence ends.
    carry: of an attention with one, what this rank's keys carry, (b n) in the accumulation dtype; added to in place, so that it is ready
    for the next call. Keep a copy to take new tokens back.
    No backward: it is for inference. Raises LayoutError, Unsupported, RanksDisagree, RankLost.
    """
    if key_indices is not None and carry is None:
        parts = [Keys(tuple(range(k.shape[2])), k, v, key_indices)]
        return decode_explicit(q, parts, length=key_layout.length, ring=ring, attention=attention)[0]
    if key_indices is not None:
        raise Unsupported("Keys at explicit indices carry nothing; pass key_layout, which may have gaps, and no key_indices.")
    return decode_with_lse(q, k, v, key_layout=key_layout, ring=ring, attention=attention, carry=carry)[0]


def decode_with_lse(
    q: Tensor, k: Tensor, v: Tensor, *, key_layout: Layout, ring: Ring, attention: Attention = _DEFAULT, carry: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`decode_attention` and the lse (b n_q h) of its rows, the sink included, in the accumulation dtype."""
    queries = key_layout.newest(q.shape[1])
    call = Call(ring, queries, key_layout, attention, "auto", "auto", train=False)
    problem = decode_problem(q, k, v, key_layout, ring, attention) or _carry_problem(q, k, queries, ring, attention, carry)
    agree(ring, call.facts(q, k, v, "decode", 0, 0) | {"new tokens": q.shape[1]}, problem)
    rows, keys = queries.spans[0], key_layout.spans[ring.rank]
    if attention.encoding is not None:
        q = attention.encoding.queries(q, queries.indices(0, q.device))
        k = attention.encoding.keys(k, key_layout.indices(ring.rank, k.device))
    if attention.select is not None:
        attention = narrowed(q, k, sight_of(ring, queries, key_layout, attention, k.shape[3], decoding=True), attention)
    with torch.no_grad(), ring.unbroken("decode"):
        groups = head_groups(attention, q.shape[2], k.shape[2])
        params = [p.detach() for p in attention.params()]
        if carry is not None:
            return _decode_carried(CarriedWork(attention, groups, params, "auto", 0, 0), ring, q, rows, k, v, keys, carry)
        work = Work(attention, groups, params, "auto", 0, 0)
        totals = work.empty(q, v.shape[3])
        if keys:
            _attend(work, totals, q, rows, k, v, keys)
        out, lse = work.whole(_reduce(ring, totals), q, v.shape[3])
        return finished(attention, out, lse), lse


def _decode_carried(
    work: CarriedWork, ring: Ring, q: Tensor, rows: Ranges, k: Tensor, v: Tensor, keys: Ranges, carry: Tensor
) -> tuple[Tensor, Tensor]:
    """Every rank has all new queries, in order, so what they give to its own keys needs no message."""
    totals = work.empty(q, v.shape[3])
    if keys:
        tiles = strips(tiles_of(work.attention.pattern, rows, keys), Chunk(0, 0, q.shape[1], rows[0]))
        work.attend(totals[0], None, Meeting.of(work, q, rows, k, v, keys), tiles, carry)
    return work.whole(_reduce(ring, totals), q, v.shape[3])


def decode_explicit(
    q: Tensor, parts: Sequence[Keys], *, length: int, ring: Ring, attention: Attention, carry: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`decode_with_lse` over keys at explicit indices, those of the new tokens among them. length: of the sequence, new tokens included.

    carry (b n): of an attention with one, what the keys of the only part carry; added to in place.
    """
    i = torch.arange(length - q.shape[1], length, device=q.device)
    check("decode at explicit indices", q, parts, ring, attention, {"new tokens": q.shape[1], "length": length})
    with torch.no_grad(), ring.unbroken("decode at explicit keys"):
        turned, parts = encoded(attention, q, i, parts)
        if carry is not None:
            mine = attend_forgetting_here(attention, turned, i, parts[0], carry)
        else:
            totals = empty(turned, parts)
            attend_here(attention, totals, turned, i, parts)
            mine = whole(totals, parts)
        total = _reduce(ring, [mine])[0]
        if attention.sink is not None:
            total.add_sink_(attention.sink.detach())
        return total.out.to(q.dtype), total.lse


def decode_problem(q: Tensor, k: Tensor, v: Tensor, key_layout: Layout, ring: Ring, attention: Attention) -> RingctxError | None:
    """Why this rank cannot decode, or None."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return Unsupported("decode_attention has no backward; call it under torch.no_grad(), or train with ring_attention.")
    if attention.dropout:
        return Unsupported("decode_attention drops nothing; pass an attention with dropout=0.0.")
    if key_layout.size != ring.size:
        return LayoutError(f"The ring has {ring.size} ranks, but the key layout has {key_layout.size}; make it for {ring.size}.")
    have, want = (k.shape[1], v.shape[1]), key_layout.count(ring.rank)
    if have != (want, want):
        return LayoutError(f"k and v have {have[0]} and {have[1]} tokens, but the layout gives rank {ring.rank} {want}.")
    if q.shape[1] > key_layout.length:
        return LayoutError(f"q has {q.shape[1]} tokens, but the key layout ends at {key_layout.length}; append the new tokens to it first.")
    return select_problem(attention, q, key_layout.length, train=False)


def _carry_problem(q: Tensor, k: Tensor, queries: Layout, ring: Ring, attention: Attention, carry: Tensor | None) -> RingctxError | None:
    """Why nothing can be carried while decoding, or None."""
    if (carry is None) != (attention.carry is None):
        given, wants = ("a carry", "has none") if attention.carry is None else ("no carry", f"has {attention.carry}")
        return ConfigError(f"decode_attention was given {given}, and the attention {wants}; pass what this rank's keys carry, or neither.")
    if carry is None:
        return None
    return carry_problem(attention.pattern, q.shape[2], (queries,), "rotate", ring.heads) or start_problem(carry, k)


def _attend(work: Work, totals: list[Partial], q: Tensor, queries: Ranges, k: Tensor, v: Tensor, keys: Ranges) -> None:
    """Attend to this rank's keys. Where a new token sees all of a branch, it is folded: the heads of one key head become rows."""
    tiles = [tiles_of(g.pattern, queries, keys) for g in work.groups]
    ratio = q.shape[2] // k.shape[2]
    foldable = not work.attention.additive and len(totals) == 1 and q.shape[1] == 1 and ratio > 1
    for n, group in enumerate(work.groups):
        if foldable and [t[0] for t in tiles[n]] == [FULL]:
            _fold(work, totals[0], group, tiles[n][0], q, queries, k, v, keys)
            tiles[n] = ()
    work.forward(totals, tiles, q, queries, k, v, keys)


def _fold(work: Work, total: Partial, group: HeadGroup, tile: Tile, q: Tensor, queries: Ranges, k: Tensor, v: Tensor, keys: Ranges) -> None:
    """Attend from one token (b 1 h d) to all keys of the tile, which is FULL, as from h / g tokens with one head a key head."""
    _, _, _, c, d = tile
    b, _, h, width = q.shape
    g, ratio = k.shape[2], h // k.shape[2]
    q_, k_ = Encoded(group, (tile,), q, queries, k, keys).rows(tile)
    folded = q_.view(b, g, ratio, width).transpose(1, 2)  # (b, ratio, g, d)
    heads = tuple(range(g))
    alike = Work(work.attention, (HeadGroup(heads, heads, heads, Full()),), work.params, "auto", 0, 0)
    part = alike.empty(folded, v.shape[3])
    alike.forward(part, [((int(FULL), 0, ratio, 0, d - c),)], folded, (range(ratio),), k_, v[:, c:d], keys)
    total.merge_(part[0].out.transpose(1, 2).reshape(b, 1, h, -1), part[0].lse.transpose(1, 2).reshape(b, 1, h))


def _reduce(ring: Ring, totals: list[Partial]) -> list[Partial]:
    """All ranks' partials, merged in rank order, so that every rank gets the same bits."""
    if ring.size == 1:
        return totals
    everyone = share(ring, torch.cat([x.reshape(-1) for t in totals for x in (t.out, t.lse)]), "partials")
    merged = [Partial(torch.zeros_like(t.out), torch.full_like(t.lse, -torch.inf)) for t in totals]
    for theirs in everyone:
        at = 0
        for total in merged:
            out = theirs[at : at + total.out.numel()].view_as(total.out)
            at += total.out.numel()
            total.merge_(out, theirs[at : at + total.lse.numel()].view_as(total.lse))
            at += total.lse.numel()
    return merged
