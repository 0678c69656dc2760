"""Sampling: the next token from its logits, the same on every rank and in every run with the same seed."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ringctx.errors import ConfigError


@dataclass
class Sampler:
    """temperature 0 takes the likeliest token. top_k 0 and top_p 1 leave all tokens in."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    _generator: torch.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ConfigError(f"generation.temperature is {self.temperature}; it is 0 (the likeliest token) or more.")
        if self.top_k < 0:
            raise ConfigError(f"generation.top_k is {self.top_k}; it is 0 (all tokens) or more.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"generation.top_p is {self.top_p}; it is more than 0 and at most 1 (all tokens).")
        self._generator = torch.Generator().manual_seed(self.seed)

    def choose(self, logits: Tensor) -> int:
        """logits (vocabulary,)  ->  a token. Ties go to the lowest token."""
        if self.temperature == 0:
            return int(logits.argmax())
        chances = self.probabilities(logits)
        return int(torch.multinomial(chances, 1, generator=self._generator))

    def probabilities(self, logits: Tensor) -> Tensor:
        """The chance of each token, float64 on the CPU: temperature first, then top_k, then top_p."""
        scores = logits.detach().double().cpu() / self.temperature
        if 0 < self.top_k < len(scores):
            kth = scores.topk(self.top_k).values[-1]
            scores = scores.masked_fill(scores < kth, float("-inf"))
        chances = scores.softmax(-1)
        if self.top_p < 1:
            ordered, order = chances.sort(descending=True, stable=True)
            likelier = ordered.cumsum(-1) - ordered  # the chance of all that are likelier
            chances = chances.index_fill(0, order[likelier >= self.top_p], 0.0)
        return chances / chances.sum()
