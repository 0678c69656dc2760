"""Keys at explicit indices: after eviction each key head of each batch row keeps tokens of its own.

Knows indices, the attention and kernels. Knows nothing of ranks or of why a key was kept.
Letters: b batch, s query tokens, n slots for keys here, f key heads of one part, h query heads of it, d key width, e value width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ringctx import kernels
from ringctx.core.attention import Attention, Encoding, scale_of
from ringctx.core.partial import Partial
from ringctx.core.pattern import EMPTY, FULL, Pattern
from ringctx.errors import Unsupported
from ringctx.kernels.base import Call, TileScores, accumulation_dtype
from ringctx.kernels.reference import column_sums

ROWS, KEYS = 256, 1024
"""Most queries and keys of a masked tile."""


@dataclass(frozen=True)
class Keys:
    """Some key heads of one rank: k (b n f d), v (b n f e), indices (b f n) int64 in any order, -1 where a slot is empty.

    heads: the f key heads' numbers in the model. is_encoded: whether k was turned by position already.
    """

    heads: tuple[int, ...]
    k: Tensor
    v: Tensor
    indices: Tensor
    is_encoded: bool = False

    def encoded(self, encoding: Encoding | None) -> Keys:
        """The same with every key turned by its own index."""
        if encoding is None or self.is_encoded:
            return self
        return replace(self, k=encode_at(encoding, self.k, self.indices), is_encoded=True)

    def query_heads(self, ratio: int) -> tuple[int, ...]:
        """The query heads that read them, `ratio` to each key head."""
        return tuple(head * ratio + n for head in self.heads for n in range(ratio))


def encode_at(encoding: Encoding, k: Tensor, indices: Tensor) -> Tensor:
    """k (b n f d) turned by indices (b f n); an empty slot counts as index 0."""
    b, n, f, d = k.shape
    rows = k.transpose(1, 2).reshape(b * f, n, 1, d)
    return encoding.keys(rows, indices.clamp(min=0).reshape(b * f, n)).view(b, f, n, d).transpose(1, 2)


def refuse(attention: Attention) -> None:
    """Raise Unsupported for what is not defined on keys at explicit indices."""
    if attention.normaliser != "softmax":
        raise Unsupported(
            "Keys at explicit indices are weighed by softmax; evict nothing (cache.evict.kind: none), or leave normaliser out."
        )
    for name in ("branches", "select", "dropout"):
        if getattr(attention, name):
            raise Unsupported(
                f"Keys at explicit indices, as eviction leaves them, are not attended with Attention({name}=...); "
                "leave that out, or evict nothing (cache.evict.kind: none)."
            )


def attend(attention: Attention, total: Partial, q: Tensor, i: Tensor, keys: Keys, heads: tuple[int, ...]) -> None:
    """Merge attention to these (encoded) keys into total, (b s h e). q (b s h d) encoded, of query heads `heads`; i (s) indices."""
    call = Call(
        q.device.type, q.dtype, len(heads), len(keys.heads), q.shape[3], keys.v.shape[3],
        mask=True, elementwise=bool(attention.elementwise), bias=bool(attention.additive),
    )  # fmt: skip
    kernel = kernels.choose(call)
    for rows, slots, scores in _tiles(attention, i, keys, heads, q.shape[3]):
        out, lse = kernel.forward(q[:, rows], keys.k[:, slots], keys.v[:, slots], scores)
        total.rows(rows.start, rows.stop).merge_(out, lse)


def sums(attention: Attention, q: Tensor, lse: Tensor, i: Tensor, keys: Keys, heads: tuple[int, ...]) -> Tensor:
    """What these queries give each (encoded) key, summed over them: sum_i exp(A_ij - lse_i), (b h n) in the accumulation dtype.

    q (b s h d) encoded, lse (b s h) of whole rows, so that each row's weights over all ranks sum to 1 (less the sink's).
    """
    total = q.new_zeros(q.shape[0], len(heads), keys.k.shape[1], dtype=accumulation_dtype(q.dtype))
    for rows, slots, scores in _tiles(attention, i, keys, heads, q.shape[3]):
        total[:, :, slots] += column_sums(q[:, rows], keys.k[:, slots], lse[:, rows], scores)
    return total


def _tiles(attention: Attention, i: Tensor, keys: Keys, heads: tuple[int, ...], width: int) -> Iterator[tuple[slice, slice, TileScores]]:
    """Tiles in which somebody may see something: rows, slots and what happens to their logits."""
    pattern, num_slots = attention.pattern, keys.indices.shape[2]
    for c in range(0, num_slots, KEYS):
        j = keys.indices[:, :, c : c + KEYS]
        filled = j[j >= 0]
        for a in range(0, len(i), ROWS) if len(filled) else ():
            rows = i[a : a + ROWS]
            verdict = pattern.judge(hull(rows), hull(filled))
            if verdict != EMPTY:
                plain = verdict == FULL and len(filled) == j.numel()
                yield slice(a, a + len(rows)), slice(c, c + j.shape[2]), scores_at(attention, rows, j, heads, width, plain)


def hull(indices: Tensor) -> range:
    """The range from the lowest to the highest of them."""
    return range(int(indices.min()), int(indices.max()) + 1)


def scores_at(attention: Attention, i: Tensor, j: Tensor, heads: tuple[int, ...], width: int, plain: bool) -> TileScores:
    """What happens to the logits of queries i (q) and keys j (b f k) in these heads; plain: all of them are seen."""
    return TileScores(
        scale=scale_of(attention, width),
        mask=None if plain else lambda: _seen(attention.pattern, i, j, heads),
        elementwise=attention.elementwise,
        bias=(lambda: _bias(attention, i, j, heads)) if attention.additive else None,
    )


def _seen(pattern: Pattern, i: Tensor, j: Tensor, heads: tuple[int, ...]) -> Tensor:
    """Who sees whom, bool (b h q n), from i (q) and j (b f n)."""
    b, f, n = j.shape
    ratio = len(heads) // f
    allowed = pattern.allows(i, j.clamp(min=0).flatten())
    allowed = allowed[(None,) * (4 - allowed.dim())].unflatten(-1, (b, f, n))  # (b|1 h|1 q b f n)
    if allowed.shape[:2] == (1, 1):
        seen = allowed[0, 0].permute(1, 2, 0, 3).repeat_interleave(ratio, 1)
    else:
        rows = [allowed[x if len(allowed) > 1 else 0] for x in range(b)]
        pick = lambda row, x, at: row[heads[at] if len(row) > 1 else 0, :, x, at // ratio]
        seen = torch.stack([torch.stack([pick(row, x, at) for at in range(len(heads))]) for x, row in enumerate(rows)])
    return seen & (j >= 0).repeat_interleave(ratio, 1).unsqueeze(2)


def _bias(attention: Attention, i: Tensor, j: Tensor, heads: tuple[int, ...]) -> Tensor:
    """What is added to the logits, (b h q n): every key head has indices of its own, so each is asked by itself."""
    b, f, n = j.shape
    ratio = len(heads) // f
    numbers = torch.tensor(heads, device=i.device).view(f, ratio)

    def one(x: int, y: int) -> Tensor:
        parts = [score.bias(numbers[y], i, j[x, y].clamp(min=0), score.params()) for score in attention.additive]
        return sum(parts[1:], parts[0]).expand(ratio, len(i), n)

    return torch.stack([torch.cat([one(x, y) for y in range(f)]) for x in range(b)])
