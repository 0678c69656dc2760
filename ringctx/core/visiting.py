"""Keys at explicit indices on a ring: keys visit queries for attention, queries visit keys for what each key is given.

Knows who sends what to whom; the mathematics is in `ringctx.core.explicit`.
Letters: b batch, s query tokens here, n slots here, h query heads, g key heads, d key width, e value width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ringctx.core.attention import Attention
from ringctx.core.explicit import Keys, attend, refuse, sums
from ringctx.core.header import Facts, agree, share
from ringctx.core.partial import Partial
from ringctx.core.ring import Message, Pending, Ring
from ringctx.errors import LayoutError, RingctxError
from ringctx.kernels.base import accumulation_dtype

Tensors = tuple[Tensor, ...]


def attend_explicit(q: Tensor, parts: Sequence[Keys], *, i: Tensor, ring: Ring, attention: Attention) -> Partial:
    """Attention of this rank's queries to the keys that all ranks hold at explicit indices; the sink is left out.

    q (b s h d), not encoded, of indices i (s); parts: this rank's keys, the same heads in the same order on every rank
    -> out (b s h e), lse (b s h). One rank's keys at a time visit. All ranks must call it together.
    Raises LayoutError, Unsupported, RanksDisagree, RankLost.
    """
    check("attention at explicit indices", q, parts, ring, attention)
    with torch.no_grad(), ring.unbroken("explicit keys"):
        q, parts = encoded(attention, q, i, parts)
        totals = empty(q, parts)
        mine = tuple(x for part in parts for x in (part.k, part.v, part.indices))
        for block in visitors(ring, "keys", mine, (1, 1, 2) * len(parts)):
            visiting = [Keys(part.heads, k, v, j, True) for part, k, v, j in zip(parts, block[::3], block[1::3], block[2::3], strict=True)]
            attend_here(attention, totals, q, i, visiting)
        return whole(totals, parts)


def sums_explicit(q: Tensor, lse: Tensor, parts: Sequence[Keys], *, i: Tensor, ring: Ring, attention: Attention) -> list[Tensor]:
    """What each key of this rank is given by the queries of all ranks: sum_i exp(A_ij - lse_i) of the final softmax.

    q (b s h d), not encoded, of indices i (s), and lse (b s h) of whole rows: this rank's share; parts as in `attend_explicit`
    -> for each part (b h' n), one row a query head, in the order of its key heads, in the accumulation dtype.
    One rank's queries at a time visit. All ranks must call it together.
    Source: Zhang et al. 2023 (H2O, arXiv 2306.14048), the accumulated attention score; here after lse is final, hence exact.
    """
    check("sums at explicit indices", q, parts, ring, attention)
    with torch.no_grad(), ring.unbroken("sums of explicit keys"):
        q, parts = encoded(attention, q, i, parts)
        total: list[Tensor] = []
        for rows, theirs, indices in visitors(ring, "queries", (q, lse, i), (1, 1, 0)):
            found = sums_here(attention, rows, theirs, indices, parts)
            total = [a + b for a, b in zip(total, found, strict=True)] if total else found
        return total


# -- one rank's part of it ----------------------------------------------------------------------------------------------


def encoded(attention: Attention, q: Tensor, i: Tensor, parts: Sequence[Keys]) -> tuple[Tensor, list[Keys]]:
    """Queries and keys turned by their indices."""
    turned = q if attention.encoding is None else attention.encoding.queries(q, i)
    return turned, [part.encoded(attention.encoding) for part in parts]


def empty(q: Tensor, parts: Sequence[Keys]) -> list[Partial]:
    """One partial for each part's query heads, having seen no key."""
    ratio, dtype = _ratio(q, parts), accumulation_dtype(q.dtype)
    return [Partial.empty((*q.shape[:2], len(p.heads) * ratio, p.v.shape[3]), dtype, q.device) for p in parts]


def attend_here(attention: Attention, totals: Sequence[Partial], q: Tensor, i: Tensor, parts: Sequence[Keys]) -> None:
    """Merge attention of encoded q to encoded keys that are here."""
    for total, part in zip(totals, parts, strict=True):
        heads = part.query_heads(_ratio(q, parts))
        attend(attention, total, q[:, :, list(heads)], i, part, heads)


def sums_here(attention: Attention, q: Tensor, lse: Tensor, i: Tensor, parts: Sequence[Keys]) -> list[Tensor]:
    """`sums_explicit` of encoded queries and keys that are here."""
    every = [part.query_heads(_ratio(q, parts)) for part in parts]
    return [sums(attention, q[:, :, list(heads)], lse[:, :, list(heads)], i, part, heads) for part, heads in zip(parts, every, strict=True)]


def whole(totals: Sequence[Partial], parts: Sequence[Keys]) -> Partial:
    """The partials of all parts as one, its heads in the model's order."""
    ratio = totals[0].out.shape[2] // len(parts[0].heads)
    order = torch.tensor([head for part in parts for head in part.query_heads(ratio)]).argsort().to(totals[0].out.device)
    return Partial(torch.cat([t.out for t in totals], 2)[:, :, order], torch.cat([t.lse for t in totals], 2)[:, :, order])


def check(what: str, q: Tensor, parts: Sequence[Keys], ring: Ring, attention: Attention, more: Facts | None = None) -> None:
    """Compare with all ranks what was asked; raise what is wrong with it, on every rank."""
    text = hashlib.sha256(attention.text().encode()).hexdigest()[:12]
    facts: Facts = {
        "call": what, "batch": q.shape[0], "heads": q.shape[2], "width": q.shape[3], "dtype": str(q.dtype).removeprefix("torch."),
        "key heads": [part.heads for part in parts], "attention": f"{str(attention)[:200]} ({text})",
    }  # fmt: skip
    agree(ring, facts | (more or {}), _problem(q, parts, attention))


def _problem(q: Tensor, parts: Sequence[Keys], attention: Attention) -> RingctxError | None:
    heads = sorted(head for part in parts for head in part.heads)
    if not heads or heads != list(range(len(heads))) or q.shape[2] % len(heads):
        return LayoutError(f"The parts have key heads {heads}; together they must be 0 up to a number that divides the {q.shape[2]} of q.")
    for part in parts:
        b, n, f, d = part.k.shape
        have = tuple(part.indices.shape), tuple(part.v.shape[:3])
        if have != ((b, f, n), (b, n, f)) or (b, d) != (q.shape[0], q.shape[3]) or f != len(part.heads):
            return LayoutError(
                f"Keys (b n f d) {tuple(part.k.shape)} of {len(part.heads)} heads have indices {have[0]} and values {have[1]} for q "
                f"{tuple(q.shape)}; pass indices (b f n) and values (b n f e), and share batch and width with q."
            )
    try:
        refuse(attention)
    except RingctxError as error:
        return error
    return None


def _ratio(q: Tensor, parts: Sequence[Keys]) -> int:
    """Query heads a key head."""
    return q.shape[2] // sum(len(part.heads) for part in parts)


# -- messages -----------------------------------------------------------------------------------------------------------


def visitors(ring: Ring, kind: str, mine: Tensors, dims: Sequence[int]) -> Iterator[Tensors]:
    """This rank's tensors, then those of every other rank, the next under way. dims: along which each differs between ranks."""
    own = tuple(x.contiguous() for x in mine)
    sizes = share(ring, torch.tensor([x.shape[dim] for x, dim in zip(own, dims, strict=True)]), "header") if ring.size > 1 else []
    coming = _post(ring, kind, own, dims, sizes, 1)
    yield mine
    for hop in range(2, ring.size + 1):
        block, pending = coming
        pending.wait()
        coming = _post(ring, kind, own, dims, sizes, hop)
        yield block


def _post(ring: Ring, kind: str, own: Tensors, dims: Sequence[int], sizes: list[Tensor], hop: int) -> tuple[Tensors, Pending]:
    """Ask the rank `hop` to the left for its tensors and send one's own as far to the right."""
    if hop >= ring.size:
        return (), ring.exchange(kind, f"{kind} at hop {hop}")
    left, right = (ring.rank - hop) % ring.size, (ring.rank + hop) % ring.size
    shapes = [(*x.shape[:dim], int(size), *x.shape[dim + 1 :]) for x, dim, size in zip(own, dims, sizes[left], strict=True)]
    block = tuple(x.new_empty(shape) for x, shape in zip(own, shapes, strict=True))
    return block, ring.exchange(kind, f"{kind} at hop {hop}", [Message(left, block)], [Message(right, own)])
