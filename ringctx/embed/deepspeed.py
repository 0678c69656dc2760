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

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch.distributed as dist
from torch import nn

from ringctx.core.attention import Attention
from ringctx.errors import ConfigError
from ringctx.training import job as jobs
from ringctx.training.job import Job

__all__ = ["DeepSpeedJob", "Mpu", "join"]


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
