"""Small runs of training, for tests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ringctx.config import Config, parse
from ringctx.core.attention import Attention
from ringctx.core.ring import Ring
from ringctx.methods.selective import Selective
from ringctx.training.job import Job
from ringctx.training.labels import shifted
from ringctx.training.share import shared
from ringctx.training.step import Trainer
from tests.tiny import tiny

TINY = """
model: {dtype: float32, device: cpu}
attention: {carry: {kind: selective}}
training:
  data: variables
  scratch: {layers: 2, hidden: 16, heads: 2, key_heads: 1, intermediate: 32}
  variables: {names: 3, values: 4, noise: 2, longer: [2]}
  context: 33
  batch: 4
  steps: 8
  warmup: 2
  memory_loss: 0.1
  save_every: 2
  evaluate_every: 4
  held_out: 4
"""


def config(out: Path, *overrides: str) -> Config:
    """A run of eight steps in a second."""
    return parse(TINY, [f"training.out={out}", *overrides])


def trainer_on(ring: Ring, carries: bool, **training: Any) -> Trainer:
    """A small Llama in float64."""
    model = tiny().double()
    asked = Attention(carry=Selective()) if carries else None
    settings = parse("training: {memory_loss: 0.3, clip: 0.5}" if carries else "training: {clip: 0.5}").training
    return Trainer.of(Job.on(ring, model, asked), replace(settings, **training))


def batch_of(ring: Ring, kind: str, length: int) -> dict[str, Any]:
    """Two sequences; the labels of some tokens do not count."""
    tokens = torch.randint(3, 97, (2, length + 1), generator=torch.Generator().manual_seed(length))
    ids, labels = shifted(tokens)
    labels = labels.clone()
    labels[0, : length // 3] = -100
    return shared({"input_ids": ids, "shift_labels": labels}, kind, ring.rank, ring.size, torch.device("cpu"))


def steps_of(ring: Ring, kind: str, length: int, carries: bool) -> tuple[list[tuple[float, ...]], list[Tensor]]:
    """What two steps say, and the weights after them."""
    trainer = trainer_on(ring, carries)
    said = [tuple(trainer.step(batch_of(ring, kind, length), n)) for n in range(2)]
    return said, [p.detach() for p in trainer.model.parameters()]


def gradients_of(ring: Ring, kind: str, length: int, carries: bool) -> list[Tensor]:
    """This rank's gradients of one batch, not averaged."""
    trainer = trainer_on(ring, carries)
    loss, memory = trainer.losses(batch_of(ring, kind, length))
    (loss + 0.3 * memory).backward()
    return [p.grad for p in trainer.model.parameters()]


def trainer_from(path: Path, *overrides: str) -> Trainer:
    """The trained model of a checkpoint, wrapped anew."""
    from ringctx.training.model import job_of

    asked = config(path.parent, f"model.path={path}", "training.scratch.layers=0", "training.data=text", *overrides)
    return Trainer.of(job_of(asked, Ring.alone(), None), asked.training)
