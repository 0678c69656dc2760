"""Layout: which indices of the sequence each rank owns.

Knows indices and ranks. Knows nothing of masks, kernels or messages.
Letters: s tokens on this rank, S tokens in the whole sequence. A rank's tokens lie in the order of its ranges.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from ringctx.errors import LayoutError

if TYPE_CHECKING:
    from ringctx.core.attention import Attention

Ranges = tuple[range, ...]


def count(ranges: Ranges) -> int:
    """How many indices the ranges hold."""
    return sum(map(len, ranges))


@lru_cache(maxsize=64)
def _indices(ranges: Ranges) -> Tensor:
    parts = [torch.arange(r.start, r.stop, r.step) for r in ranges]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def indices_of(ranges: Ranges, device: torch.device | str = "cpu") -> Tensor:
    """The indices of the ranges in their order, int64 (s,). Shared between callers: do not write to it."""
    return _indices(ranges).to(device)


def join(ranges: Iterable[range]) -> Ranges:
    """The same indices in the same order with neighbours that continue each other made one, and empty ranges left out."""
    joined: list[range] = []
    for r in ranges:
        if not r:
            continue
        r = range(r[0], r[-1] + 1, r.step if len(r) > 1 else 1)
        last = joined[-1] if joined else None
        if last and last.step == 1 == r.step and last.stop == r.start:
            joined[-1] = range(last.start, r.stop)
        else:
            joined.append(r)
    return tuple(joined)


def ranges_of(indices: Tensor) -> Ranges:
    """Ascending int64 indices (n,) as the fewest unit-step ranges, or as one range if all steps are equal."""
    if len(indices) == 0:
        return ()
    steps = indices.diff()
    if len(indices) > 2 and bool((steps == steps[0]).all()):
        step = int(steps[0])
        return (range(int(indices[0]), int(indices[-1]) + 1, step),)
    breaks = (steps != 1).nonzero().flatten()
    starts = torch.cat([indices[:1], indices[breaks + 1]]).tolist()
    stops = torch.cat([indices[breaks], indices[-1:]]).tolist()
    return tuple(range(a, b + 1) for a, b in zip(starts, stops, strict=True))


def take(ranges: Ranges, spans: Sequence[tuple[int, int]]) -> Ranges:
    """The ranges of the tokens at local positions a..b-1, for each (a, b) of the spans."""
    starts = list(accumulate(map(len, ranges), initial=0))
    parts = [r[max(a - s, 0) : max(b - s, 0)] for a, b in spans for r, s in zip(ranges, starts, strict=False)]
    return join(parts)


@dataclass(frozen=True)
class Layout:
    """Per rank, the indices it owns, as builtin ranges.

    Law: no index belongs to two ranks. The constructors below also hold: together exactly 0..S-1, and sizes equal up to
    chunk rounding. A layout of keys may have gaps (evicted or not yet written tokens). A rank may own nothing.

    Raises LayoutError when two ranges share an index, or an index is negative.
    """

    spans: tuple[Ranges, ...]

    def __post_init__(self) -> None:
        if not self.spans:
            raise LayoutError("A layout needs at least one rank; got none.")
        object.__setattr__(self, "spans", tuple(join(ranges) for ranges in self.spans))
        everything = [r for ranges in self.spans for r in ranges]
        if any(r.step < 1 or r[0] < 0 for r in everything):
            raise LayoutError("A layout's ranges must ascend and begin at 0 or later.")
        everything.sort(key=lambda r: r[0])
        if any(a[-1] >= b[0] for a, b in zip(everything, everything[1:], strict=False)):  # they interleave: look closer
            indices = torch.cat([indices_of((r,)) for r in everything])
            if len(indices.unique()) != len(indices):
                raise LayoutError("Two ranges of a layout share an index; every token must live on one rank only.")

    def shifted(self, by: int) -> Self:
        """The same layout of tokens that come `by` indices later, such as a later chunk of a sequence."""
        return type(self)(tuple(tuple(range(r.start + by, r.stop + by, r.step) for r in ranges) for ranges in self.spans))

    def newest(self, count: int) -> Layout:
        """The last `count` indices, all on rank 0: where queries stand that every rank holds, as while decoding."""
        return Layout(((range(max(0, self.length - count), self.length),), *((),) * (self.size - 1)))

    # -- the stock layouts ------------------------------------------------------------------------------------------

    @classmethod
    def contiguous(cls, length: int, size: int, *, block: int = 1) -> Self:
        """Rank r owns the r-th chunk, of whole blocks.   length 8, size 2:  0 1 2 3 | 4 5 6 7; with block 3:  0 1 2 | 3 4 5 6 7"""
        _check(length, size)
        if block < 1:
            raise LayoutError(f"A contiguous layout deals blocks of at least one token; got {block}.")
        blocks = -(-length // block)
        edges = [min(length, blocks * i // size * block) for i in range(size + 1)]
        return cls(tuple((range(a, b),) for a, b in zip(edges, edges[1:], strict=False)))

    @classmethod
    def zigzag(cls, length: int, size: int) -> Self:
        """Rank r owns chunk r and its mirror, so causal work is equal for all.   length 8, size 2:  0 1 6 7 | 2 3 4 5"""
        _check(length, size)
        return cls.documents((0, length), size) if length else cls(((),) * size)

    @classmethod
    def striped(cls, length: int, size: int) -> Self:
        """Token i lives on rank i mod size.   length 8, size 2:  0 2 4 6 | 1 3 5 7"""
        _check(length, size)
        return cls(tuple((range(r, length, size),) for r in range(size)))

    @classmethod
    def residue(cls, length: int, size: int, dilation: int) -> Self:
        """Tokens of equal i mod dilation lie together, so a dilated pattern stays within few ranks: within one where ranks divide dilation.

        length 8, size 2, dilation 4:  0 4 1 5 | 2 6 3 7        length 6, size 2, dilation 4:  0 4 1 5 | 2 3
        """
        _check(length, size)
        if dilation < 1:
            raise LayoutError(f"A residue layout needs a dilation of at least 1; got {dilation}.")
        order = tuple(range(c, length, dilation) for c in range(dilation))
        edges = [length * i // size for i in range(size + 1)]
        borders = list(accumulate(map(len, order), initial=0))
        if dilation % size == 0:  # whole classes to each rank
            edges = borders[:: dilation // size]
        elif size % dilation == 0:  # whole ranks to each class
            of_class = size // dilation
            edges = [a + len(c) * i // of_class for a, c in zip(borders, order, strict=False) for i in range(of_class)] + [length]
        return cls(tuple(take(order, [(a, b)]) for a, b in zip(edges, edges[1:], strict=False)))

    @classmethod
    def documents(cls, cu_seqlens: Sequence[int] | Tensor, size: int) -> Self:
        """Every document is cut in 2 x size chunks, dealt as in zigzag, so packed causal documents are balanced too.

        cu_seqlens: where documents begin, and the end: 0 < ... < S. Left-over tokens go to chunks in turn.
        """
        edges = [int(x) for x in cu_seqlens]
        if len(edges) < 2 or edges[0] != 0 or any(a >= b for a, b in zip(edges, edges[1:], strict=False)):
            raise LayoutError(f"cu_seqlens must begin with 0 and ascend, one number more than documents; got {edges[:8]}.")
        _check(edges[-1], size)
        chunks = 2 * size
        owned: list[list[range]] = [[] for _ in range(size)]
        spare = 0  # where the next left-over token goes
        for start, stop in zip(edges, edges[1:], strict=False):
            base, extra = divmod(stop - start, chunks)
            at = start
            for c in range(chunks):
                width = base + ((c - spare) % chunks < extra)
                owned[min(c, chunks - 1 - c)].append(range(at, at + width))
                at += width
            spare = (spare + extra) % chunks
        return cls(tuple(join(ranges) for ranges in owned))

    @classmethod
    def balanced(cls, length: int, size: int, attention: Attention) -> Self:
        """Blocks of tokens dealt by the planned cost of their queries, so that any pattern loads all ranks alike."""
        from ringctx.core.balance import deal

        _check(length, size)
        return cls(deal(length, size, attention.seen))

    # -- what a layout answers --------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """How many ranks share the sequence."""
        return len(self.spans)

    @cached_property
    def length(self) -> int:
        """One more than the largest index; S where there are no gaps."""
        return max((r[-1] + 1 for ranges in self.spans for r in ranges), default=0)

    @cached_property
    def _hash(self) -> int:
        return hash(self.spans)

    def __hash__(self) -> int:
        return self._hash

    def count(self, rank: int) -> int:
        """How many tokens this rank owns."""
        return count(self.spans[rank])

    def indices(self, rank: int, device: torch.device | str = "cpu") -> Tensor:
        """This rank's indices in local order, int64 (s,)."""
        return indices_of(self.spans[rank], device)

    def owner(self, index: int) -> int:
        """The rank that owns this index."""
        for rank, ranges in enumerate(self.spans):
            if any(index in r for r in ranges):
                return rank
        raise LayoutError(f"No rank owns index {index}; this layout has {sum(map(count, self.spans))} tokens up to {self.length - 1}.")

    def shard(self, x: Tensor, rank: int, dim: int = 1) -> Tensor:
        """This rank's tokens of a whole tensor: (b, S, ...) -> (b, s, ...)."""
        if x.shape[dim] != self.length:
            raise LayoutError(f"This layout is of {self.length} tokens, but dim {dim} of the tensor has {x.shape[dim]}.")
        return x.index_select(dim, self.indices(rank, x.device))

    def unshard(self, shards: Sequence[Tensor], dim: int = 1) -> Tensor:
        """The whole tensor from all ranks' shards, in rank order; local, sends nothing."""
        if len(shards) != self.size:
            raise LayoutError(f"This layout has {self.size} ranks, but {len(shards)} shards were given.")
        order = torch.cat([self.indices(r, shards[0].device) for r in range(self.size)])
        if len(order) != self.length:
            raise LayoutError(f"This layout has gaps: {len(order)} tokens up to index {self.length - 1}; unshard needs them all.")
        return torch.cat(list(shards), dim).index_select(dim, order.argsort())

    def __str__(self) -> str:
        return f"{self.length} tokens on {self.size} ranks"


def _check(length: int, size: int) -> None:
    if size < 1 or length < 0:
        raise LayoutError(f"A layout needs at least one rank and no negative length; got {length} tokens on {size} ranks.")
