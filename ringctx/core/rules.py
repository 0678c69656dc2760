"""The stock patterns that are rules: each says who sees whom by one line of arithmetic on i and j.

Knows indices. The functions that make them are in `ringctx.patterns`; those that are given as a list are in `ringctx.core.listed`.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ringctx.core.pattern import (
    CAUSAL,
    EMPTY,
    FAR,
    FULL,
    PARTIAL,
    Causal,
    HeadGroups,
    Pattern,
    Verdict,
    common_batch,
    group_heads,
    nearest_cut,
    shared_verdict,
)
from ringctx.errors import ConfigError


@dataclass(frozen=True)
class Window(Pattern):
    """i - j < width."""

    width: int

    def __post_init__(self) -> None:
        at_least(1, "window", self.width, "a window counts the token itself, so window(1) is the token alone")

    def allows(self, i: Tensor, j: Tensor) -> Tensor:
        return i[:, None] - j < self.width

    def judge(self, q: range, k: range) -> Verdict:
        if q[-1] - k[0] < self.width:
            return FULL
        return EMPTY if q[0] - k[-1] >= self.width else PARTIAL

    def band(self, q: range, k: range) -> tuple[int, int] | None:
        return 1 - self.width, FAR

    def __str__(self) -> str:
        return f"window({self.width})"


@dataclass(frozen=True)
class Sinks(Pattern):
    """j < count."""

    count: int

    def __post_init__(self) -> None:
        at_least(0, "sinks", self.count, "it counts the first tokens that all see")

    def allows(self, i: Tensor, j: Tensor) -> Tensor:
        return (j < self.count).repeat(len(i), 1)

    def judge(self, q: range, k: range) -> Verdict:
        if k[-1] < self.count:
            return FULL
        return EMPTY if k[0] >= self.count else PARTIAL

    def __str__(self) -> str:
        return f"sinks({self.count})"


@dataclass(frozen=True)
class Prefix(Pattern):
    """j <= i or j < count."""

    count: int

    def __post_init__(self) -> None:
        at_least(0, "prefix", self.count, "it counts the first tokens that all see")

    def allows(self, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i[:, None]) | (j < self.count)

    def judge(self, q: range, k: range) -> Verdict:
        verdict = Causal().judge(q, k)
        if verdict is FULL or k[-1] < self.count:
            return FULL
        unprefixed = k[1] if verdict is CAUSAL else k[0]  # in a CAUSAL tile everybody sees the first key anyhow
        return verdict if unprefixed >= self.count else PARTIAL

    def __str__(self) -> str:
        return f"prefix({self.count})"


@dataclass(frozen=True)
class Dilated(Pattern):
    """(i - j) mod rate = 0."""

    rate: int

    def __post_init__(self) -> None:
        at_least(1, "dilated", self.rate, "it is the distance from one key seen to the next")

    def allows(self, i: Tensor, j: Tensor) -> Tensor:
        return (i[:, None] - j) % self.rate == 0

    def judge(self, q: range, k: range) -> Verdict:
        steps = (span.step for span in (q, k) if len(span) > 1)
        common = math.gcd(self.rate, *steps)  # all distances of the tile are equal modulo this
        if (q[0] - k[0]) % common:
            return EMPTY
        if common == self.rate:
            return FULL
        nearest, farthest = q[0] - k[-1], q[-1] - k[0]
        return PARTIAL if farthest // self.rate * self.rate >= nearest else EMPTY

    def __str__(self) -> str:
        return f"dilated({self.rate})"


@dataclass(frozen=True)
class Band(Pattern):
    """low <= j - i <= high."""

    low: int
    high: int

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ConfigError(f"band was asked from {self.low} to {self.high}; it goes from the lower distance j - i to the higher.")

    def allows(self, i: Tensor, j: Tensor) -> Tensor:
        ahead = j - i[:, None]
        return (ahead >= self.low) & (ahead <= self.high)

    def judge(self, q: range, k: range) -> Verdict:
        least, most = k[0] - q[-1], k[-1] - q[0]
        if least >= self.low and most <= self.high:
            return FULL
        if most < self.low or least > self.high:
            return EMPTY
        aligned = len(q) == len(k) and q.step == k.step and k[0] - q[0] == self.high and least >= self.low
        return CAUSAL if aligned else PARTIAL

    def band(self, q: range, k: range) -> tuple[int, int] | None:
        return self.low, self.high

    def __str__(self) -> str:
        return f"band({self.low}, {self.high})"


@dataclass(frozen=True)
class Chunks(Pattern):
    """i // size - j // size < count."""

    size: int
    count: int

    def __post_init__(self) -> None:
        at_least(1, "chunks", self.size, "its first number is a chunk's length")
        at_least(1, "chunks", self.count, "it counts the chunk of the token itself, so chunks(size, 1) is that alone")

    def allows(self, i: Tensor, j: Tensor) -> Tensor:
        return (i // self.size)[:, None] - j // self.size < self.count

    def judge(self, q: range, k: range) -> Verdict:
        if q[-1] // self.size - k[0] // self.size < self.count:
            return FULL
        return EMPTY if q[0] // self.size - k[-1] // self.size >= self.count else PARTIAL

    def cut(self, span: range) -> int | None:
        middle = (span[0] + span[-1] + 1) // 2 // self.size * self.size
        return nearest_cut(span, (middle, middle + self.size))

    def __str__(self) -> str:
        return f"chunks({self.size}, {self.count})"


@dataclass(frozen=True)
class From(Pattern):
    """i >= first."""

    first: int

    def __post_init__(self) -> None:
        at_least(0, "queries_from", self.first, "it is the first query that sees all")

    def allows(self, i: Tensor, j: Tensor) -> Tensor:
        return (i >= self.first)[:, None].repeat(1, len(j))

    def judge(self, q: range, k: range) -> Verdict:
        if q[0] >= self.first:
            return FULL
        return EMPTY if q[-1] < self.first else PARTIAL

    def __str__(self) -> str:
        return f"queries_from({self.first})"


@dataclass(frozen=True)
class Fixed(Pattern):
    """j <= i, and j is in i's segment or a summary: among the last few of its own segment."""

    segment: int
    summaries: int

    def __post_init__(self) -> None:
        at_least(1, "fixed", self.segment, "its first number is a segment's length")
        at_least(1, "fixed", self.summaries, "its second number counts the keys at a segment's end that all later ones see")
        if self.summaries > self.segment:
            raise ConfigError(f"{self} asks for more summaries than a segment has tokens; write fixed(l, c) with c at most l.")

    def allows(self, i: Tensor, j: Tensor) -> Tensor:
        i = i[:, None]
        is_summary = j % self.segment >= self.segment - self.summaries
        return (j <= i) & ((i // self.segment == j // self.segment) | is_summary)

    def judge(self, q: range, k: range) -> Verdict:
        verdict = Causal().judge(q, k)
        if verdict is EMPTY or self._are_summaries(k[0], min(k[-1], q[-1] // self.segment * self.segment - 1)):
            return verdict  # keys before the last query's segment are the only ones that fixed hides and causal does not
        share_a_segment = max(q[0], k[0]) // self.segment <= min(q[-1], k[-1]) // self.segment
        return PARTIAL if share_a_segment or self._first_summary(k[0]) <= min(q[-1], k[-1]) else EMPTY

    def _are_summaries(self, first: int, last: int) -> bool:
        of_one_segment = self._first_summary(first) == first and first // self.segment == last // self.segment
        return last < first or of_one_segment or self.summaries == self.segment

    def _first_summary(self, index: int) -> int:
        """The first summary at the index or after it."""
        return index + max(0, self.segment - self.summaries - index % self.segment)

    def __str__(self) -> str:
        return f"fixed({self.segment}, {self.summaries})"


@dataclass(frozen=True)
class RandomBlocks(Pattern):
    """j // size is one of the blocks drawn for i // size among those at or before it."""

    size: int
    count: int
    seed: int

    def __post_init__(self) -> None:
        at_least(1, "random_blocks", self.size, "its first number is a block's length")
        at_least(1, "random_blocks", self.count, "its second number counts the blocks that a query sees")

    def allows(self, i: Tensor, j: Tensor) -> Tensor:
        rows, at = torch.unique(i // self.size, return_inverse=True)
        columns = j // self.size
        seen = [torch.isin(columns, torch.tensor(_drawn(self, row), device=j.device)) for row in rows.tolist()]
        return torch.stack(seen)[at] if seen else torch.zeros(len(i), len(j), dtype=torch.bool, device=j.device)

    def judge(self, q: range, k: range) -> Verdict:
        rows, columns = (sorted({index // self.size for index in span}) for span in (q, k))
        seen = [set(columns).intersection(_drawn(self, row)) for row in rows]
        if not any(seen):
            return EMPTY
        if all(len(some) == len(columns) for some in seen):
            return FULL
        a_tile_each = len(q) == len(rows) == len(columns) == len(k)
        return CAUSAL if a_tile_each and all(some == set(columns[: n + 1]) for n, some in enumerate(seen)) else PARTIAL

    def cut(self, span: range) -> int | None:
        middle = (span[0] + span[-1] + 1) // 2 // self.size * self.size
        return nearest_cut(span, (middle, middle + self.size))

    def __str__(self) -> str:
        return f"random_blocks({self.size}, {self.count}, {self.seed})"


@lru_cache(maxsize=65_536)
def _drawn(pattern: RandomBlocks, row: int) -> tuple[int, ...]:
    """The blocks of keys that a block of queries sees; a row's draw knows no other row, nor how long the sequence is."""
    return tuple(random.Random(f"{pattern.seed} {row}").sample(range(row + 1), min(pattern.count, row + 1)))


@dataclass(frozen=True)
class GlobalTokens(Pattern):
    """i or j among the tokens, which ascend."""

    tokens: tuple[int, ...]

    def __post_init__(self) -> None:
        for token in self.tokens:
            at_least(0, "global_tokens", token, "a token is named by its index in the whole sequence")

    def allows(self, i: Tensor, j: Tensor) -> Tensor:
        tokens = torch.tensor(self.tokens, device=i.device)
        return torch.isin(i, tokens)[:, None] | torch.isin(j, tokens)

    def judge(self, q: range, k: range) -> Verdict:
        queries, keys = self._count(q), self._count(k)
        if queries == len(q) or keys == len(k):
            return FULL
        if queries == keys == 0:
            return EMPTY
        return CAUSAL if len(q) == len(k) == 2 and self._count(q[1:]) and self._count(k[:1]) else PARTIAL

    def _count(self, span: range) -> int:
        first, end = bisect_left(self.tokens, span[0]), bisect_right(self.tokens, span[-1])
        return end - first if span.step == 1 else sum(token in span for token in self.tokens[first:end])

    def __str__(self) -> str:
        return f"global_tokens({some(self.tokens)})"


@dataclass(frozen=True)
class PerHead(Pattern):
    """Each head its own pattern: groups of heads, ascending, that together are 0..n-1."""

    groups: HeadGroups

    def __post_init__(self) -> None:
        common_batch("per_head", *(pattern for _, pattern in self.groups))
        named = [head for heads, _ in self.groups for head in heads]
        doubled = sorted({head for head in named if named.count(head) > 1})
        missing = sorted(set(range(max(named, default=0) + 1)) - set(named))
        if doubled or missing or min(named) < 0:
            wrong = f"names {some(doubled)} twice" if doubled else f"leaves out {some(missing)}" if missing else "names heads below 0"
            raise ConfigError(f"per_head gives every head one pattern, and this {wrong}; name each of the heads 0, 1, 2, ... once.")

    def allows(self, i: Tensor, j: Tensor) -> Tensor:
        planes: dict[int, Tensor] = {}
        for heads, pattern in self.groups:
            seen = pattern.allows(i, j)
            alike = seen.dim() == 2 or seen.shape[-3] == 1
            seen = seen.squeeze(-3) if seen.dim() > 2 and alike else seen
            planes |= {head: seen if alike else seen[..., head, :, :] for head in heads}
        return torch.stack(torch.broadcast_tensors(*(planes[head] for head in sorted(planes))), dim=-3)

    def judge(self, q: range, k: range) -> Verdict:
        return shared_verdict(pattern.judge(q, k) for _, pattern in self.groups)

    def cut(self, span: range) -> int | None:
        cuts = (pattern.cut(span) for _, pattern in self.groups)
        return nearest_cut(span, (cut for cut in cuts if cut is not None))

    def batch(self) -> int | None:
        return common_batch("per_head", *(pattern for _, pattern in self.groups))

    def heads(self, num_heads: int) -> HeadGroups:
        if (named := sum(len(heads) for heads, _ in self.groups)) != num_heads:
            raise ConfigError(f"per_head names {named} heads and the queries have {num_heads}; name each of these once.")
        return group_heads(
            ([head for head in heads if head in others], part)
            for heads, pattern in self.groups
            for others, part in pattern.heads(num_heads)
        )

    def __str__(self) -> str:
        return "per_head(" + ", ".join(f"{pattern}: {some(heads)}" for heads, pattern in self.groups) + ")"


def at_least(least: int, name: str, value: int, meaning: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} was given {value!r}; {meaning}: write a whole number of {least} or more.")


def some(numbers: Sequence[int]) -> str:
    """0 4 9, or the first and the last when there are many."""
    shown = [str(number) for number in numbers]
    return " ".join(shown if len(shown) <= 8 else [*shown[:3], "...", *shown[-2:], f"({len(shown)} in all)"])
