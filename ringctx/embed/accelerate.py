"""Rings inside DDP, FSDP2 and Accelerate, which all average gradients over all ranks.

    job = ringctx.embed.accelerate.join(model, ring=2)
    fully_shard(model)                                 # or DDP(model), or accelerator.prepare(model, optimizer, loader)
    for batch in job.loader(loader):
        model(**batch).loss.backward()

Gradient accumulation and clipping stay as they are. Knows nothing that `ringctx.embed.join` does not; it is the same function.
"""

from __future__ import annotations

from ringctx.training.job import Job, join

__all__ = ["Job", "join"]
