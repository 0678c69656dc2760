"""Sampling: the next token from its logits, the same on every rank and in every run with the same seed."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ringctx.errors import ConfigError


@dataclass
class Sampler:
    """temperature 0 takes the likeliest token. top_k 0, top_p 1 and repetition_penalty 1 change nothing.

    seen: the tokens so far, prompt and answer, which repetition_penalty makes less likely; the caller adds to them.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    seen: set[int] = field(default_factory=set, repr=False)
    _generator: torch.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ConfigError(f"generation.temperature is {self.temperature}; it is 0 (the likeliest token) or more.")
        if self.top_k < 0:
            raise ConfigError(f"generation.top_k is {self.top_k}; it is 0 (all tokens) or more.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"generation.top_p is {self.top_p}; it is more than 0 and at most 1 (all tokens).")
        if not 0 < self.repetition_penalty < math.inf:
            raise ConfigError(f"generation.repetition_penalty is {self.repetition_penalty}; it is a finite number above 0 (1 for none).")
        self._generator = torch.Generator().manual_seed(self.seed)

    def choose(self, logits: Tensor) -> int:
        """logits (vocabulary,)  ->  a token. Ties go to the lowest token."""
        if self.temperature == 0:
            return int(self.penalised(logits).argmax())
        chances = self.probabilities(logits)
        return int(torch.multinomial(chances, 1, generator=self._generator))

    def probabilities(self, logits: Tensor) -> Tensor:
        """The chance of each token, float64 on the CPU: repetition penalty first, then temperature, top_k and top_p."""
        scores = self.penalised(logits).detach().double().cpu() / self.temperature
        if 0 < self.top_k < len(scores):
            kth = scores.topk(self.top_k).values[-1]
            scores = scores.masked_fill(scores < kth, float("-inf"))
        chances = scores.softmax(-1)
        if self.top_p < 1:
            ordered, order = chances.sort(descending=True, stable=True)
            likelier = ordered.cumsum(-1) - ordered  # the chance of all that are likelier
            chances = chances.index_fill(0, order[likelier >= self.top_p], 0.0)
        return chances / chances.sum()

    def penalised(self, logits: Tensor) -> Tensor:
        """logits (vocabulary,)  ->  those of seen tokens divided by the penalty, in float32 (Keskar et al. 2019, CTRL, section 4.1).

        As in transformers, a logit below 0 is multiplied instead: dividing it, as the paper writes, would make its token likelier.
        """
        if self.repetition_penalty == 1:
            return logits
        ids = [token for token in self.seen if token < len(logits)]  # an embedding may have more rows than there are logits
        seen = torch.tensor(ids, dtype=torch.int64, device=logits.device)
        scores = logits.float()
        old = scores[seen]
        return scores.index_copy(0, seen, torch.where(old < 0, old * self.repetition_penalty, old / self.repetition_penalty))
