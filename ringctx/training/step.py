"""Step: forward, backward, gradients averaged over all ranks, clipped, applied: the same on every rank.

Knows the job. Knows nothing of data or of when it is called.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from ringctx.config_training import TrainingConfig
from ringctx.errors import ConfigError
from ringctx.training.job import Job
from ringctx.training.loss import memory_loss

LEAST_RATE = 0.1
"""Of the highest learning rate, where the cosine ends."""
AVERAGED = 1 << 24
"""The most numbers of a gradient that are gathered from all ranks at once."""
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW remembers of a parameter."""


class Taken(NamedTuple):
    """What a step found: the mean loss of a label, the memory loss before its weight (0 without), and the norm before clipping."""

    loss: float
    memory: float
    grad_norm: float


class State(NamedTuple):
    """All that steps change, whole, by the parameters' names: weights, and AdamW's moments of each."""

    weights: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]]


@dataclass
class Trainer:
    """A job's model and its optimizer. All ranks hold the same weights and call each method together."""

    job: Job
    config: TrainingConfig
    optimizer: torch.optim.Optimizer

    @classmethod
    def of(cls, job: Job, config: TrainingConfig, state: State | None = None) -> Self:
        """With AdamW, which decays matrices alone; going on from a state, from whatever number of ranks it comes."""
        optimizer = adamw(job.model, config)
        if state is not None:
            fill(job.model, state.weights)
            for name, p in job.model.named_parameters():
                if name in state.moments:
                    optimizer.state[p] = {key: x.to("cpu" if key == "step" else p.device) for key, x in state.moments[name].items()}
        return cls(job, config, optimizer)

    @property
    def model(self) -> Any:
        """The wrapped model."""
        return self.job.model

    @property
    def called(self) -> Any:
        """What is called with a batch: the model, or an engine around it."""
        return self.job.model

    def losses(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The mean loss and the memory loss (0 where it never has a weight) of a batch that was shared out."""
        loss = self.called(**batch).loss
        if not self.config.memory_loss:
            return loss, torch.zeros_like(loss)
        return loss, memory_loss(self.job.context.memories, batch["share"].layout, self.job.ring, self.job.gather)

    def objective(self, batch: dict[str, Any], number: int, weight: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """What is to be made small at this step, and the two losses it is made of. weight: of the batch's labels."""
        loss, memory = self.losses(batch)
        costs = self.config.memory_loss if number >= self.config.memory_from else 0.0
        return weight * loss + costs * memory, weight * loss.detach(), memory.detach()

    def step(self, batch: dict[str, Any], number: int) -> Taken:
        """The optimizer's step `number`, counted from 0."""
        self.model.train()
        objective, loss, memory = self.objective(batch, number)
        objective.backward()
        self.average()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip or math.inf)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(number)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Taken(float(loss), float(memory), float(norm))

    def average(self) -> None:
        """Average gradients over all ranks, summed in the order of ranks, so that all get the same bits."""
        if self.job.size == 1:
            return
        for p in (p for p in self.model.parameters() if p.requires_grad):
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad.contiguous()
            for part in p.grad.view(-1).split(AVERAGED):
                total = torch.zeros_like(part)
                for of_rank in self.job.gather(part, "grads"):
                    total += of_rank
                part.copy_(total / self.job.size)

    def rate(self, number: int) -> float:
        """The learning rate of a step: a line up, then half a cosine down."""
        warmup, highest = self.config.warmup, self.config.learning_rate
        if number < warmup:
            return highest * (number + 1) / warmup
        done = (number - warmup) / max(self.config.steps - warmup, 1)
        return highest * (LEAST_RATE + (1 - LEAST_RATE) * 0.5 * (1 + math.cos(math.pi * done)))

    def state(self) -> State:
        """Weights and moments, whole on rank 0 at least. All ranks call it together."""
        params = dict(self.model.named_parameters())
        moments = {name: self.optimizer.state[p] for name, p in params.items() if p in self.optimizer.state}
        return State({name: p.detach() for name, p in params.items()}, moments)


MakeTrainer = Callable[[Job, TrainingConfig, State | None], Trainer]
"""How a job's steps are made, by ringctx itself or by an engine, from a state or anew."""


@torch.no_grad()
def fill(model: Any, weights: dict[str, Tensor]) -> None:
    """Give a model, before an engine has it, these weights."""
    for name, p in model.named_parameters():
        p.copy_(weights[name])


def adamw(model: Any, config: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW, which decays matrices alone. Raises ConfigError where nothing is to be trained."""
    kinds = [[p for p in model.parameters() if p.requires_grad and (p.dim() > 1) is wide] for wide in (True, False)]
    groups = [{"params": some, "weight_decay": decay} for some, decay in zip(kinds, (config.weight_decay, 0.0), strict=True) if some]
    if not groups:
        raise ConfigError("No parameter of the model requires a gradient, so there is nothing to train.")
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95))
