"""Policies that look at indices alone: the first tokens and the latest ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ringctx.methods.eviction.policy import CachePolicy, Held, at_least


@dataclass(frozen=True)
class Streaming(CachePolicy):
    """Keep the first tokens of the sequence and the latest ones.

    A query sees `sinks` first and `recent` latest keys, itself included: one place is left for the token that comes.
    Positions are true indices. (The paper counts them in the cache instead.)
    Source: Xiao et al. 2023 (StreamingLLM, arXiv 2309.17453), `evict_for_space(1)`.
    """

    sinks: int = 4
    recent: int = 1024
    at_steps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        at_least(0, self, sinks=self.sinks)
        at_least(1, self, recent=self.recent)

    def budget(self, layer: int, num_layers: int, length: int) -> int:
        return self.sinks + self.recent - 1

    def score(self, held: Held) -> Tensor:
        later_is_better = held.indices.double()
        return later_is_better.masked_fill(held.indices < self.sinks, math.inf)


@dataclass(frozen=True)
class Duo(Streaming):
    """Streaming key heads keep sinks and recent keys, the others (retrieval heads) keep all.

    streaming: (layer, key head) of each streaming head, as a trained or measured gate says.
    Source: Xiao et al. 2024 (DuoAttention, arXiv 2410.10819).
    """

    streaming: frozenset[tuple[int, int]] = frozenset()

    def score(self, held: Held) -> Tensor:
        scores = super().score(held)
        for place, head in enumerate(held.heads):
            if (held.layer, head) not in self.streaming:
                scores[:, place] = math.inf
        return scores
