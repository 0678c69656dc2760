"""Pattern: who may see whom, in indices of the whole sequence (i query, j key).

Knows indices. Knows nothing of ranks, kernels or tensors' meaning. Stock patterns are in `ringctx.patterns`;
here are the protocol, the algebra (& | ~) and the two patterns everything else leans on.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ringctx.errors import ConfigError

HeadGroups = tuple[tuple[tuple[int, ...], "Pattern"], ...]


class Verdict(enum.IntEnum):
    """What a pattern says about a tile (a span of queries times a span of keys). The order serves And and Or."""

    EMPTY = 0
    """No query of the span sees any key of the span."""
    FULL = 1
    """Every query sees every key."""
    CAUSAL = 2
    """Equally many queries and keys, and the n-th query sees exactly the first n keys (n from 1)."""
    PARTIAL = 3
    """Anything else, or not known: ask `allows`."""


EMPTY, FULL, CAUSAL, PARTIAL = Verdict
FAR = 1 << 62
"""Further than any key is from any query."""


class Pattern:
    """Which keys a query may see; frozen, hashable by content, closed under & | ~.

    Law: `judge` is sound: it never contradicts `allows`. Stock patterns are exact on unit-step ranges.
    `str` is for people and may be shortened; `repr` holds the whole content and is the same in every process.
    """

    def allows(self, i: Tensor, j: Tensor) -> Tensor:
        """True where query index i (q,) may see key index j (k,).

        Returns bool (q, k), (h, q, k) when heads differ, or (b, h, q, k) with b or h possibly 1 when batches differ.
        """
        raise NotImplementedError

    def judge(self, q: range, k: range) -> Verdict:
        """The verdict on queries q times keys k; both are ascending ranges and not empty."""
        raise NotImplementedError

    def band(self, q: range, k: range) -> tuple[int, int] | None:
        """low and high, if in this tile query i sees exactly the keys with low <= j - i <= high; None where not, or not known."""
        return (-FAR, FAR) if self.judge(q, k) is FULL else None

    def cut(self, span: range) -> int | None:
        """An index strictly inside the span where it is best divided (a document's first token), or None.

        Law: span[0] < cut <= span[-1], so that both sides of the cut keep something.
        """
        return None

    def batch(self) -> int | None:
        """How many rows of the batch the pattern tells apart, or None if they are all alike."""
        return None

    def heads(self, num_heads: int) -> HeadGroups:
        """Groups of heads that share one pattern; together they are 0..num_heads-1, and no group's pattern has heads."""
        return group_heads([(range(num_heads), self)])

    def __and__(self, other: Pattern) -> Pattern:
        return And(self, other)

    def __or__(self, other: Pattern) -> Pattern:
        return Or(self, other)

    def __invert__(self) -> Pattern:
        return Not(self)


@dataclass(frozen=True)
class Full(Pattern):
    """Every query sees every key."""

    def allows(self, i: Tensor, j: Tensor) -> Tensor:
        return torch.ones(len(i), len(j), dtype=torch.bool, device=i.device)

    def judge(self, q: range, k: range) -> Verdict:
        return FULL

    def __str__(self) -> str:
        return "full"


@dataclass(frozen=True)
class Causal(Pattern):
    """A query sees itself and what came before: j <= i."""

    def allows(self, i: Tensor, j: Tensor) -> Tensor:
        return j <= i[:, None]

    def judge(self, q: range, k: range) -> Verdict:
        if k[-1] <= q[0]:
            return FULL
        if k[0] > q[-1]:
            return EMPTY
        aligned = len(q) == len(k) and q.step == k.step and 0 <= q[0] - k[0] < q.step
        return CAUSAL if aligned else PARTIAL

    def band(self, q: range, k: range) -> tuple[int, int] | None:
        return -FAR, 0

    def __str__(self) -> str:
        return "causal"


@dataclass(frozen=True)
class Pair(Pattern):
    """Two patterns as one; they may differ in heads and batch, which broadcast."""

    left: Pattern
    right: Pattern

    def __post_init__(self) -> None:
        common_batch(type(self).__name__, self.left, self.right)

    def cut(self, span: range) -> int | None:
        cuts = self.left.cut(span), self.right.cut(span)
        return nearest_cut(span, (cut for cut in cuts if cut is not None))

    def batch(self) -> int | None:
        return common_batch(type(self).__name__, self.left, self.right)

    def heads(self, num_heads: int) -> HeadGroups:
        rights = self.right.heads(num_heads)
        return group_heads(
            ([head for head in heads if head in others], type(self)(left, right))
            for heads, left in self.left.heads(num_heads)
            for others, right in rights
        )


@dataclass(frozen=True)
class And(Pair):
    """A query sees what both patterns let it see."""

    def allows(self, i: Tensor, j: Tensor) -> Tensor:
        return self.left.allows(i, j) & self.right.allows(i, j)

    def judge(self, q: range, k: range) -> Verdict:
        left = self.left.judge(q, k)
        if left is EMPTY or (right := self.right.judge(q, k)) is EMPTY:
            return EMPTY
        return max(left, right)  # FULL gives way to the other verdict, and PARTIAL to none

    def band(self, q: range, k: range) -> tuple[int, int] | None:
        left = self.left.band(q, k)
        if left is None or (right := self.right.band(q, k)) is None:
            return None
        return max(left[0], right[0]), min(left[1], right[1])

    def __str__(self) -> str:
        return " & ".join(f"({part})" if isinstance(part, Or) else f"{part}" for part in (self.left, self.right))


@dataclass(frozen=True)
class Or(Pair):
    """A query sees what either pattern lets it see."""

    def allows(self, i: Tensor, j: Tensor) -> Tensor:
        return self.left.allows(i, j) | self.right.allows(i, j)

    def judge(self, q: range, k: range) -> Verdict:
        left = self.left.judge(q, k)
        if left is FULL or (right := self.right.judge(q, k)) is FULL:
            return FULL
        return max(left, right)  # EMPTY gives way to the other verdict, and PARTIAL to none

    def band(self, q: range, k: range) -> tuple[int, int] | None:
        if self.left.judge(q, k) is EMPTY:
            return self.right.band(q, k)
        return self.left.band(q, k) if self.right.judge(q, k) is EMPTY else super().band(q, k)

    def __str__(self) -> str:
        return " | ".join(f"({part})" if isinstance(part, And) else f"{part}" for part in (self.left, self.right))


@dataclass(frozen=True)
class Not(Pattern):
    """A query sees what the pattern hides from it."""

    pattern: Pattern

    def __post_init__(self) -> None:
        common_batch("Not", self.pattern)

    def allows(self, i: Tensor, j: Tensor) -> Tensor:
        return ~self.pattern.allows(i, j)

    def judge(self, q: range, k: range) -> Verdict:
        return {EMPTY: FULL, FULL: EMPTY}.get(self.pattern.judge(q, k), PARTIAL)

    def cut(self, span: range) -> int | None:
        return self.pattern.cut(span)

    def batch(self) -> int | None:
        return self.pattern.batch()

    def heads(self, num_heads: int) -> HeadGroups:
        return group_heads((heads, Not(pattern)) for heads, pattern in self.pattern.heads(num_heads))

    def __str__(self) -> str:
        return f"~({self.pattern})" if isinstance(self.pattern, Pair) else f"~{self.pattern}"


def group_heads(parts: Iterable[tuple[Iterable[int], Pattern]]) -> HeadGroups:
    """Head groups, ascending, with the heads of equal patterns together and without groups that have no heads."""
    groups: dict[Pattern, list[int]] = {}
    for heads, pattern in parts:
        groups.setdefault(pattern, []).extend(heads)
    return tuple(sorted(((tuple(sorted(heads)), pattern) for pattern, heads in groups.items() if heads), key=lambda group: group[0]))


def nearest_cut(span: range, indices: Iterable[int]) -> int | None:
    """Of the indices that divide the span, the one nearest its middle (the lower of two); None if none divides it."""
    twice_the_middle = span[0] + span[-1] + 1
    inside = (index for index in indices if span[0] < index <= span[-1])
    return min(inside, key=lambda index: (abs(2 * index - twice_the_middle), index), default=None)


def shared_verdict(verdicts: Iterator[Verdict]) -> Verdict:
    """The verdict all agree on, else PARTIAL; at least one is given."""
    first = next(verdicts)
    return first if all(verdict is first for verdict in verdicts) else PARTIAL


def common_batch(name: str, *patterns: Pattern) -> int | None:
    """How many batch rows these patterns together tell apart, or None; raises ConfigError if they cannot be one pattern."""
    for pattern in patterns:
        if not isinstance(pattern, Pattern):
            meant = f" (did you mean {pattern.__name__}()?)" if hasattr(pattern, "__name__") else ""
            raise ConfigError(f"{name} composes patterns, and {pattern!r} is none{meant}; ringctx.patterns has those there are.")
    batches = sorted({batch for pattern in patterns if (batch := pattern.batch()) is not None})
    if len(batches) > 1:
        raise ConfigError(
            f"{name} composes patterns of one batch, and these tell {' and '.join(map(str, batches))} rows apart; "
            "give all of them the ids of the same batch."
        )
    return batches[0] if batches else None
