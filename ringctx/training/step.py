"""Step: forward, backward, gradients summed over the ring, clipped, applied: the same on every rank.

Knows the wrapped model and the ring. Knows nothing of data or of when it is called.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ringctx.config_training import TrainingConfig
from ringctx.core.header import share
from ringctx.core.ring import Ring
from ringctx.huggingface import Context
from ringctx.training.batch import Batch
from ringctx.training.loss import memory_loss, token_loss

LEAST_RATE = 0.1
"""Of the highest learning rate, where the cosine ends."""


class Taken(NamedTuple):
    """What a step found: the mean loss of a label, the memory loss before its weight (0 without), and the norm before clipping."""

    loss: float
    memory: float
    grad_norm: float


@dataclass
class Trainer:
    """A wrapped model and its optimizer. All ranks hold the same weights and call each method together."""

    model: Any
    context: Context
    config: TrainingConfig
    optimizer: torch.optim.Optimizer

    @classmethod
    def of(cls, model: Any, context: Context, config: TrainingConfig) -> Trainer:
        """With AdamW, which decays matrices alone."""
        kinds = [[p for p in model.parameters() if p.requires_grad and (p.dim() > 1) is wide] for wide in (True, False)]
        groups = [{"params": some, "weight_decay": decay} for some, decay in zip(kinds, (config.weight_decay, 0.0), strict=True)]
        return cls(model, context, config, torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95)))

    @property
    def ring(self) -> Ring:
        """The ranks that share each sequence."""
        return self.context.ring

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.model.device
        return device

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """This rank's parts of the mean loss and of the memory loss (0 where it never has a weight)."""
        with self.context.running(batch.layout):
            logits = self.model(input_ids=batch.ids, position_ids=batch.positions, use_cache=False).logits
        loss = token_loss(logits, batch)
        if not self.config.memory_loss:
            return loss, torch.zeros((), device=self.device)
        return loss, memory_loss(self.context.memories, batch.layout, self.ring)

    def step(self, batch: Batch, number: int) -> Taken:
        """The optimizer's step `number`, counted from 0."""
        self.model.train()
        loss, memory = self.losses(batch)
        weight = self.config.memory_loss if number >= self.config.memory_from else 0.0
        (loss + weight * memory).backward()
        found = self.reduce(torch.stack((loss.detach().double(), memory.detach().double())))
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip or math.inf)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(number)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Taken(float(found[0]), float(found[1]), float(norm))

    def reduce(self, found: Tensor) -> Tensor:
        """Sum gradients, and these numbers (n,) float64, over the ring, in the order of ranks, so that all get the same bits."""
        if self.ring.size == 1:
            return found
        params = [p for p in self.model.parameters() if p.requires_grad]
        flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in params])
        total = torch.stack(share(self.ring, flat, "grads")).sum(0)
        for p, part in zip(params, total.split([p.numel() for p in params]), strict=True):
            p.grad = part.view_as(p)
        return torch.stack(share(self.ring, found, "losses")).sum(0)

    def rate(self, number: int) -> float:
        """The learning rate of a step: a line up, then half a cosine down."""
        warmup, highest = self.config.warmup, self.config.learning_rate
        if number < warmup:
            return highest * (number + 1) / warmup
        done = (number - warmup) / max(self.config.steps - warmup, 1)
        return highest * (LEAST_RATE + (1 - LEAST_RATE) * 0.5 * (1 + math.cos(math.pi * done)))
