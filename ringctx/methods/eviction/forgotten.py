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
    """Drop the keys that carry the largest F while there are more than the budget, and all whose F is above the threshold or the bound.

    keys: the budget of every layer, or one a layer; a query sees so many keys, itself included: one place is left for the token
    that comes. None: as many as there are.
    bound: of each later row at most this share of the softmax is lost, in every head, if no L_ij - L_ii exceeds the layer's swing:
    key j has at most exp(swing - F) of it, since a row's own key has at least exp(L_ii), and is dropped where that is below
    bound / ((j + 1) (j + 2)); these shares of all keys add up to the bound. 0: nobody is dropped by it.
    F only grows, so a key that was dropped would never have been wanted more; first tokens
    carry nothing and stay.
    Source: Leviathan, Kalman & Matias 2024 (Selective Attention, arXiv 2410.02703), context pruning; before each token here.
    """

    keys: int | tuple[int, ...] | None = None
    threshold: float = math.inf
    bound: float = 0.0
    swings: tuple[float, ...] = ()
    at_steps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        given = () if self.keys is None else (self.keys,) if isinstance(self.keys, int) else self.keys
        if self.keys == () or any(number < 2 for number in given):
            raise ConfigError(f"Forgotten was given keys {self.keys}; a token sees itself and another key at least: 2 or more.")
        if not self.threshold > 0:
            raise ConfigError(f"Forgotten was given threshold {self.threshold}; it must be more than 0, since new keys carry 0.")

        if not 0 <= self.bound < 1:
            raise ConfigError(f"Forgotten was given bound {self.bound}; it is the share of a softmax that may be lost, below 1.")

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
        carry = held.carry.double()[:, None].expand(held.indices.shape)
        drops = carry > self.threshold
        if self.bound:
            j = held.indices.double().clamp(min=0)
            drops = drops | (carry > self.swings[held.layer] + ((j + 1) * (j + 2) / self.bound).log())
        return (-carry).masked_fill(drops, -torch.inf)
