"""ringctx inside a training job that somebody else drives: DeepSpeed, FSDP2, DDP, Accelerate, a Trainer.

`join(model, ring=R)` makes the model attend over rings of R consecutive ranks; `job.loader(loader)` hands out this rank's share of
each batch, and the model's own `loss` is the mean over all labels of all ranks, its gradient right after the engine's averaging.
"""

from __future__ import annotations

from ringctx.training.job import Job, join
from ringctx.training.share import Share

__all__ = ["Job", "Share", "join"]
