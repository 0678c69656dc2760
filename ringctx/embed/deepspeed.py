"""Rings inside DeepSpeed: ZeRO over all ranks, batches counted by data ranks.

    job = ringctx.embed.deepspeed.join(model, ring=2)
    engine, *_ = deepspeed.initialize(model=model, config=config, mpu=job.mpu)
    for batch in job.loader(loader):
        engine.backward(engine(**batch).loss)
        engine.step()

DeepSpeed has a notion of ranks that share a sequence, but scales gradients differently at stage 3 than below (by the ring's size).
So it is told of data ranks alone, of which it has all for gradients and weights, and one a ring for counting batches: then every
stage divides the sum of gradients by the number of ranks, and every stage's gradient norm is that of one process.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ringctx.config_training import TrainingConfig
from ringctx.core.attention import Attention
from ringctx.core.ring import collective
from ringctx.embed.zero import resume, state_of
from ringctx.errors import ConfigError
from ringctx.training import job as jobs
from ringctx.training.job import Job
from ringctx.training.labels import IGNORED
from ringctx.training.step import State, Taken, Trainer, adamw, fill

__all__ = ["DeepSpeedJob", "DeepSpeedTrainer", "Mpu", "join", "resume", "state_of"]


class Mpu:
    """What `deepspeed.initialize(mpu=…)` asks about ranks."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._alone = dist.new_subgroups(1)[0]

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        """Over which gradients are averaged and weights sharded: all ranks."""
        return dist.group.WORLD

    get_sequence_data_parallel_group = get_data_parallel_group

    def get_sequence_data_parallel_world_size(self) -> int:
        """How many these are."""
        return self.job.size

    def get_sequence_data_parallel_rank(self) -> int:
        """This rank among them."""
        return dist.get_rank()

    def get_data_parallel_group_ranks(self) -> range:
        """All of them."""
        return range(self.job.size)

    def get_data_parallel_world_size(self) -> int:
        """How many batches are trained on at once: one a ring."""
        return self.job.data_size

    def get_data_parallel_rank(self) -> int:
        """Which of these this rank has a part of."""
        return self.job.data_rank

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """Ranks that hold other parts of the weights by hand: this one alone."""
        return self._alone

    def get_model_parallel_world_size(self) -> int:
        """1."""
        return 1

    def get_model_parallel_rank(self) -> int:
        """0."""
        return 0

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank


@dataclass(eq=False)
class DeepSpeedJob(Job):
    """A Job with what DeepSpeed asks for."""

    mpu: Mpu | None = None

    def __post_init__(self) -> None:
        self.mpu = Mpu(self)


def join(
    model: nn.Module, *, ring: int | None = None, attention: Attention | Mapping[int, Attention] | None = None, **asked: Any
) -> DeepSpeedJob:
    """`ringctx.embed.join`, for `deepspeed.initialize(model=model, …, mpu=job.mpu)`, which is to be called after it.

    Raises what that raises, and ConfigError where torch.distributed was not begun and no launcher's variables are there.
    """
    job = jobs.join(model, ring=ring, attention=attention, **asked)
    if not dist.is_initialized():
        raise ConfigError("DeepSpeed wants process groups on one rank too; call deepspeed.init_distributed() first, or use torchrun.")
    return DeepSpeedJob(**{field.name: getattr(job, field.name) for field in fields(Job)})


@dataclass
class DeepSpeedTrainer(Trainer):
    """Steps that a DeepSpeed engine takes, as `ringctx train --deepspeed FILE` asks."""

    engine: Any = None

    @classmethod
    def made(cls, file: Path, job: Job, config: TrainingConfig, state: State | None = None) -> Self:
        """By a configuration of DeepSpeed. What it leaves open follows from `training`; going on from a state of any engine.

        Raises ConfigError where the file and `training` cannot both be right.
        """
        import deepspeed

        if not dist.is_initialized():  # one rank
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            os.environ.setdefault("LOCAL_RANK", "0")
        deepspeed.init_distributed(verbose=False)
        if state is not None:
            fill(job.model, state.weights)
        asked = _filled(file, job, config)
        engine, optimizer, *_ = deepspeed.initialize(
            model=job.model, config=asked, optimizer=None if "optimizer" in asked else adamw(job.model, config), mpu=Mpu(job)
        )
        if state is not None:
            resume(engine, state)
        return cls(job, config, optimizer, engine)

    @collective("DeepSpeed's step")
    def step(self, batch: dict[str, Any], number: int) -> Taken:
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(number)
        losses = []
        parts = _parts(batch, self.engine.gradient_accumulation_steps())
        for part, weight in zip(parts, self._weights(parts), strict=True):
            objective, *found = self.objective(part, number, weight)
            self.engine.backward(objective)
            losses.append(found)
            norm = self._norm() if self.engine.is_gradient_accumulation_boundary() else 0.0
            self.engine.step()
        loss, memory = torch.stack([torch.stack(found) for found in losses]).mean(0).tolist()
        return Taken(loss, memory, float(self.engine.get_global_grad_norm() or norm))

    def _weights(self, parts: list[dict[str, Any]]) -> list[float]:
        """How many labels each part has, over all ranks, 1 on average: the engine takes the mean of parts."""
        counts = torch.stack([(part["labels"] != IGNORED).sum() for part in parts]).double()
        counts = torch.stack(self.job.gather(counts)).sum(0)
        weights: list[float] = (counts / counts.mean().clamp(min=1)).tolist()
        return weights

    def _norm(self) -> float:
        """Of gradients that no optimizer of DeepSpeed's holds: at stage 0 in fp32 it reports none."""
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(grads)) if grads else 0.0

    @property
    def called(self) -> Any:
        return self.engine

    @collective("gathering DeepSpeed's weights")
    def state(self) -> State:
        return state_of(self.engine)


def _filled(file: Path, job: Job, config: TrainingConfig) -> dict[str, Any]:
    """The file's configuration, with what follows from `training`."""
    try:
        asked: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"DeepSpeed's configuration {str(file)!r} cannot be read ({error}); give a JSON file such as configs/zero1.json."
        ) from error
    parts = asked.get("gradient_accumulation_steps", 1)
    if config.batch % parts:
        raise ConfigError(f"training.batch is {config.batch}, and {file.name} accumulates {parts} gradients; these must divide it.")
    sizes = [name for name in ("train_batch_size", "train_micro_batch_size_per_gpu", "scheduler") if name in asked]
    if sizes:
        raise ConfigError(f"{file.name} says {', '.join(sizes)}; leave these out, since they follow from training.batch and learning_rate.")
    follow = {"train_micro_batch_size_per_gpu": config.batch // parts, "gradient_clipping": config.clip}
    return follow | {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False} | asked


def _parts(batch: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """A batch cut into so many of fewer sequences."""
    rows = len(batch["input_ids"]) // count
    cut = lambda x, n: x[n * rows : (n + 1) * rows] if isinstance(x, Tensor) and len(x) > 1 else x
    return [{name: cut(x, n) for name, x in batch.items()} for n in range(count)]
