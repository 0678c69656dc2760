"""Carry: a number per key, grown by the queries that have seen it, which later queries subtract from their logits.

Knows patterns and layouts: in which order runs of queries meet a key, and what cannot be carried. Knows nothing of tensors' travel.
A *chunk* is a run of neighbouring tokens of one rank; all of a chunk's queries come before all of the next chunk's.
Source: Leviathan, Kalman & Matias 2024 (Selective Attention, arXiv 2410.02703); the chunks are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ringctx.core.layout import Layout
from ringctx.core.listed import Documents
from ringctx.core.pattern import And, Causal, Not, Or, Pattern
from ringctx.core.tiles import Spans, needs
from ringctx.errors import RingctxError, Unsupported
from ringctx.kernels.carried import Gives


@runtime_checkable
class Carry(Gives, Protocol):
    """A carry whose number F is a running sum of what head 0's logits give; frozen, hashable, and printed by its content."""

    @property
    def tau(self) -> float:
        """F from which a key counts as forgotten, where memory is measured."""

    @property
    def rectifies(self) -> bool:
        """Whether `gives` is relu, which a kernel that computes whole tiles knows."""


@dataclass(frozen=True)
class Chunk:
    """Queries at local positions begin..end-1 of one rank, of neighbouring indices."""

    rank: int
    begin: int
    end: int
    indices: range


@dataclass(frozen=True)
class Order:
    """All chunks, ascending by index, and which keys of each owner each of them sees (local positions)."""

    chunks: tuple[Chunk, ...]
    spans: tuple[tuple[Spans, ...], ...]
    """By chunk, then by owner."""

    @cached_property
    def of_rank(self) -> tuple[tuple[int, ...], ...]:
        """For each rank the numbers of its chunks, ascending."""
        ranks = range(len(self.spans[0]) if self.spans else 0)
        return tuple(tuple(n for n, chunk in enumerate(self.chunks) if chunk.rank == rank) for rank in ranks)

    def mine(self, rank: int) -> tuple[int, ...]:
        """The numbers of this rank's chunks, ascending."""
        return self.of_rank[rank] if self.of_rank else ()


@lru_cache(maxsize=256)
def order_of(pattern: Pattern, layout: Layout, key_layout: Layout) -> Order:
    """The order in which queries of the layout meet keys of the key layout."""
    chunks = []
    for rank, ranges in enumerate(layout.spans):
        at = 0
        for indices in ranges:
            chunks.append(Chunk(rank, at, at + len(indices), indices))
            at += len(indices)
    chunks.sort(key=lambda chunk: chunk.indices[0])
    spans = tuple(tuple(needs((pattern,), (chunk.indices,), keys) for keys in key_layout.spans) for chunk in chunks)
    return Order(tuple(chunks), spans)


def without_last(layout: Layout) -> Layout:
    """The layout less its last chunk: what the last queries give, nobody meets any more."""
    last = max((r for ranges in layout.spans for r in ranges), key=lambda r: r[-1], default=None)
    return Layout(tuple(tuple(r for r in ranges if r != last) for ranges in layout.spans))


def in_turn(order: Order, layout: Layout, key_layout: Layout, transport: str, nodes: int) -> bool:
    """Whether keys that go round meet the chunks in ascending order, so that what they carry can ride along (one pass)."""
    if layout.size == 1:
        return True
    single = all(len(mine) <= 1 for mine in order.of_rank)
    ascending = [chunk.rank for chunk in order.chunks] == sorted(chunk.rank for chunk in order.chunks)
    return single and ascending and layout == key_layout and transport in ("rotate", "fetch") and nodes == 1


def first_tokens(pattern: Pattern) -> tuple[tuple[int, ...], ...]:
    """The first token of each document, for each row of the batch (one row where all are alike). Raises Unsupported."""
    match pattern:
        case Documents():
            rows = []
            for row in pattern.rows:
                first: dict[int, int] = {}
                for start, document in zip(row.starts, row.ids, strict=True):
                    first.setdefault(document, start)
                rows.append(tuple(sorted(first.values())))
            return tuple(rows)
        case And():
            left, right = first_tokens(pattern.left), first_tokens(pattern.right)
            num_rows = max(len(left), len(right))
            return tuple(tuple(sorted({*left[n % len(left)], *right[n % len(right)]})) for n in range(num_rows))
        case Or() | Not():
            parts = (pattern.left, pattern.right) if isinstance(pattern, Or) else (pattern.pattern,)
            if any(first_tokens(part) != ((0,),) for part in parts):
                raise Unsupported(f"A carry must know where documents begin, and {pattern} hides that; write causal() & documents(...).")
    return ((0,),)


def spared(pattern: Pattern, j: Tensor) -> Tensor:
    """Which keys of indices j (n) are the first of a document and never marked: bool (b|1, n)."""
    return torch.stack([torch.isin(j, torch.tensor(row, device=j.device)) for row in first_tokens(pattern)])


def is_causal(pattern: Pattern) -> bool:
    """Whether the pattern says by its wording that nobody sees a later key."""
    match pattern:
        case Causal():
            return True
        case And():
            return is_causal(pattern.left) or is_causal(pattern.right)
        case Or():
            return is_causal(pattern.left) and is_causal(pattern.right)
    return False


def carry_problem(pattern: Pattern, num_heads: int, layouts: tuple[Layout, ...], transport: str, heads: int) -> RingctxError | None:
    """Why nothing can be carried in such a call, or None. heads: of the ring's head groups."""
    if len(pattern.heads(num_heads)) > 1:
        return Unsupported(f"Head 0 gives to keys that all heads subtract from, and {pattern} differs by head; give all heads one pattern.")
    if not is_causal(pattern):
        return Unsupported(f"A carry grows from earlier to later queries, and {pattern} is not causal by its wording; add causal() with &.")
    try:
        first_tokens(pattern)
    except RingctxError as error:
        return error
    if transport in ("heads", "pass_q") or heads > 1:
        what = "a ring with head groups" if heads > 1 else f"transport={transport!r}"
        return Unsupported(f"A carry needs head 0 wherever keys are met, and {what} spreads heads or queries; use rotate, fetch or gather.")
    return _layout_problem(layouts[0]) if layouts[0].size > 1 else None


def _layout_problem(layout: Layout) -> RingctxError | None:
    stepped = next((r for ranges in layout.spans for r in ranges if r.step != 1 and len(r) > 1), None)
    if stepped is None:
        return None
    return Unsupported(
        f"A carry is summed over runs of neighbouring queries, and this layout gives a rank every {stepped.step}th token (striped), so "
        "each query would need a sum of its own from every rank; use Layout.contiguous (one pass), .zigzag, .documents or .balanced."
    )
