"""Columns and diagonals that the last queries attend to (vertical-slash), and the first and latest keys (A-shape).

Source: MInference, arXiv 2407.02490, and its code. Letters: s queries here, n keys here, L last queries, h heads, N indices.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ringctx.core.header import share
from ringctx.core.lines import Lines
from ringctx.core.pattern import Pattern, group_heads
from ringctx.core.rules import PerHead
from ringctx.core.select import Sight
from ringctx.errors import ConfigError
from ringctx.methods.selectors.summaries import KIND, at_least_one, collect, largest
from ringctx.patterns import sinks, window


@dataclass(frozen=True)
class VerticalSlash:
    """Per head: the keys that the last queries weigh most, and the distances; all queries see these keys and distances.

    With A the causal softmax of the last L = `last` queries: column j has sum_i A_ij, diagonal d has the sum of A_ij with i - j = d.
    The `verticals` best columns are kept, of which the first `first` of the sequence always, and the `slashes` best diagonals, of
    which the nearest `near` always. Each diagonal is widened to squares of `tile` queries and keys; 1 leaves it a line.
    Raises ConfigError when more is forced than kept.
    """

    verticals: int = 1000
    slashes: int = 6096
    last: int = 64
    first: int = 30
    near: int = 100
    tile: int = 64
    prefill = True
    decode = False
    trains = False

    def __post_init__(self) -> None:
        at_least_one("VerticalSlash", verticals=self.verticals, slashes=self.slashes, last=self.last, tile=self.tile)
        if not 0 <= self.first <= self.verticals or not 0 <= self.near <= self.slashes:
            raise ConfigError(
                f"VerticalSlash keeps {self.verticals} verticals with the first {self.first} forced, and {self.slashes} slashes with "
                f"the nearest {self.near} forced; force none or more, and no more than are kept."
            )

    def select(self, q: Tensor, k: Tensor, sight: Sight) -> Pattern:
        vertical, slash = sums_of_last(q, k, sight, self.last)
        vertical[:, : self.first] = torch.inf
        slash[:, : self.near] = torch.inf
        columns, offsets = largest(vertical, self.verticals), largest(slash, self.slashes)
        chosen = lambda mask: tuple(mask.nonzero()[:, 0].tolist())
        lines = [Lines(chosen(columns[h]), chosen(offsets[h]), self.tile) for h in range(q.shape[1])]
        return PerHead(group_heads(([h], pattern) for h, pattern in enumerate(lines)))


@dataclass(frozen=True)
class AShape:
    """The first `initial` keys and the latest `local` ones, for every head; it looks at nothing and sends nothing."""

    initial: int = 100
    local: int = 800
    prefill = True
    decode = True
    trains = False

    def __post_init__(self) -> None:
        at_least_one("AShape", initial=self.initial, local=self.local)

    def select(self, q: Tensor, k: Tensor, sight: Sight) -> Pattern:
        return sinks(self.initial) | window(self.local)


def last_queries(q: Tensor, sight: Sight, last: int) -> tuple[Tensor, Tensor]:
    """The indices of the sequence's last queries, ascending (L,), and the queries (L h d), on every rank."""
    everyone = torch.cat([sight.layout.indices(r) for r in range(sight.ring.size)]).sort().values[-last:]
    return everyone, collect(sight.ring, q, sight.layout, everyone)


def sums_of_last(q: Tensor, k: Tensor, sight: Sight, last: int) -> tuple[Tensor, Tensor]:
    """What the last queries' causal attention A gives each key, sum_i A_ij, and each distance, sum of A_ij with i - j = d: (h, N) both.

    Only the last queries, one denominator a row, and these sums travel. A key that no rank holds has -inf.
    """
    ring, length = sight.ring, sight.length
    rows, queries = last_queries(q, sight, last)
    keys = sight.key_layout.indices(ring.rank)
    h = q.shape[1]
    mine, slash = q.new_zeros(len(keys), h, dtype=torch.float64), q.new_zeros(h, length, dtype=torch.float64)
    distance = (rows[:, None] - keys).to(q.device)
    for head, weights in _weights(queries, k, sight, distance):
        mine[:, head] = weights.sum(0)
        slash[head].index_add_(0, distance.clamp(min=0).flatten(), weights.flatten())
    vertical = q.new_full((length, h), -torch.inf, dtype=torch.float64)
    counts = [sight.key_layout.count(r) for r in range(ring.size)]
    for rank, part in enumerate(share(ring, mine, KIND, counts)):
        vertical[sight.key_layout.indices(rank, q.device)] = part
    return vertical.T.contiguous(), torch.stack(share(ring, slash, KIND)).sum(0)


def _weights(queries: Tensor, k: Tensor, sight: Sight, distance: Tensor) -> Iterator[tuple[int, Tensor]]:
    """For each head the causal softmax of queries (L h d) over the whole ring, of which this rank's keys, float64 (L n)."""
    ratio = queries.shape[1] // k.shape[1]

    def logits(head: int) -> Tensor:
        products = queries[:, head].double() @ k[:, head // ratio].double().T
        return (products * sight.scale).masked_fill(distance < 0, -torch.inf)

    own = torch.stack([torch.logsumexp(logits(head), -1) for head in range(queries.shape[1])]) if len(k) else None
    own = queries.new_full((queries.shape[1], len(queries)), -torch.inf, dtype=torch.float64) if own is None else own
    whole = torch.logsumexp(torch.stack(share(sight.ring, own, KIND)), 0)
    whole = whole.masked_fill(whole.isneginf(), 0.0)  # a query whose keys are all gone weighs nothing
    for head in range(queries.shape[1]):
        yield head, (logits(head) - whole[head][:, None]).exp()
