"""Context pruning of Selective Attention: the keys that later queries subtract most from are dropped."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ringctx.errors import ConfigError
from ringctx.methods.eviction.policy import CachePolicy, Held


@dataclass(frozen=True)
class Forgotten(CachePolicy):
    """Drop the keys that carry the largest F while there are more than the budget, and all whose F is above the threshold.

    keys: the budget of every layer, or one a layer; a query sees so many keys, itself included: one place is left for the token
    that comes. None: as many as there are. F only grows, so a key that was dropped would never have been wanted more; first tokens
    carry nothing and stay.
    Source: Leviathan, Kalman & Matias 2024 (Selective Attention, arXiv 2410.02703), context pruning; before each token here.
    """

    keys: int | tuple[int, ...] | None = None
    threshold: float = math.inf
    at_steps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        given = () if self.keys is None else (self.keys,) if isinstance(self.keys, int) else self.keys
        if self.keys == () or any(number < 2 for number in given):
            raise ConfigError(f"Forgotten was given keys {self.keys}; a token sees itself and another key at least: 2 or more.")
        if not self.threshold > 0:
            raise ConfigError(f"Forgotten was given threshold {self.threshold}; it must be more than 0, since new keys carry 0.")

    def budget(self, layer: int, num_layers: int, length: int) -> int:
        if self.keys is None:
            return length
        if isinstance(self.keys, int):
            return self.keys - 1
        if len(self.keys) != num_layers:
            raise ConfigError(f"Forgotten was given budgets of {len(self.keys)} layers, but the model has {num_layers}; give one a layer.")
        return self.keys[layer] - 1

    def score(self, held: Held) -> Tensor:
        if held.carry is None:
            raise ConfigError(f"Keys of layer {held.layer} carry nothing to be judged by; give its attention a carry, or evict otherwise.")
        carry = held.carry.double()
        return (-carry).masked_fill(carry > self.threshold, -torch.inf)[:, None].expand(held.indices.shape)
