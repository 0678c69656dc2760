"""Policies that look at what queries gave each key, summed over the final softmax: H2O, SnapKV, PyramidKV.

With grouped queries the votes of the query heads that share a key head are averaged. (SnapKV's own code expands the keys
first, so that its cache grows to all query heads.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from ringctx.errors import ConfigError
from ringctx.methods.eviction.policy import CachePolicy, Held, at_least


@dataclass(frozen=True)
class H2O(CachePolicy):
    """Keep the latest keys and, of the others, those that all queries so far gave most: the heavy hitters.

    After each token each key head keeps `heavy + recent` keys; a dropped key's sum is dropped with it.
    Source: Zhang et al. 2023 (H2O, arXiv 2306.14048). There keys are held rotated; here they keep their true indices.
    """

    heavy: int
    recent: int
    at_steps: ClassVar[bool] = True
    accumulates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        at_least(0, self, heavy=self.heavy, recent=self.recent)
        at_least(1, self, **{"heavy + recent": self.heavy + self.recent})

    def budget(self, layer: int, num_layers: int, length: int) -> int:
        return self.heavy + self.recent

    def voters(self, begin: int, end: int) -> range:
        return range(begin, end)

    def score(self, held: Held) -> Tensor:
        return held.mass.double().masked_fill(held.indices >= held.length - self.recent, math.inf)


@dataclass(frozen=True)
class SnapKV(CachePolicy):
    """Keep the last `window` keys and, of those before, the ones that the last `window` queries gave most, neighbours pooled.

    Neighbours are the keys held next to a key, `kernel` of them with itself, wherever they live; outside there are zeros.
    Source: Li et al. 2024 (SnapKV, arXiv 2404.14469). Where fewer queries were read since the last eviction, those vote.
    """

    keys: int
    window: int = 32
    kernel: int = 5
    pooling: Literal["avg", "max"] = "avg"

    def __post_init__(self) -> None:
        at_least(1, self, keys=self.keys, window=self.window, kernel=self.kernel)
        if self.keys <= self.window:
            raise ConfigError(f"{type(self).__name__} keeps {self.keys} keys, its window of {self.window} among them; keep more than that.")
        if self.kernel % 2 == 0:
            raise ConfigError(f"{type(self).__name__} was given kernel {self.kernel}; it must be odd, so that neighbours lie evenly.")

    def budget(self, layer: int, num_layers: int, length: int) -> int:
        return self.keys

    def voters(self, begin: int, end: int) -> range:
        return range(max(begin, end - self.window), end)

    def score(self, held: Held) -> Tensor:
        latest = held.indices >= held.length - held.num_voters
        votes, indices = held.everywhere(held.mass.double().masked_fill(latest, 0.0))
        if votes.shape[-1]:
            pool = avg_pool1d if self.pooling == "avg" else max_pool1d
            votes = pool(votes, self.kernel, 1, self.kernel // 2)
        own = torch.searchsorted(indices.contiguous(), held.indices.clamp(min=0).contiguous())
        return votes.gather(-1, own).masked_fill(latest, math.inf)


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV with more keys in the lower layers: `keys` is the average, and budgets fall evenly from layer to layer.

    Source: Cai et al. 2024 (PyramidKV, arXiv 2406.02069), as kvpress computes it: the last layer keeps keys / beta, its window among them.
    Where a sequence is too short for such a fall, every layer keeps `keys`.
    """

    beta: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, beta=self.beta)

    def budget(self, layer: int, num_layers: int, length: int) -> int:
        least = self.keys / self.beta
        most = 2 * self.keys - least
        if most >= length - self.window:
            most = length - self.window
            least = 2 * self.keys - most
        if not length >= most >= least >= self.window:
            return self.keys
        step = (most - least) / (num_layers - 1) if num_layers > 1 else 0.0
        return round(most - layer * step)
