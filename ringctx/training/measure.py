"""What held-out sequences say: their mean loss and, where few labels count, how many are met exactly."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ringctx.training.data import Pairs
from ringctx.training.job import Job
from ringctx.training.labels import IGNORED

BATCH_TOKENS = 16_384
"""Tokens that are measured at once, on all ranks together."""


@dataclass(frozen=True)
class Measured:
    """length: tokens of a sequence. loss: the mean of -log p over all labels. exact: the share of labels that are the likeliest token,
    None where logits exist a tile at a time."""

    length: int
    loss: float
    exact: float | None


@torch.no_grad()
def held_out(job: Job, pairs: Pairs) -> Measured:
    """Measure these sequences, ids and labels (b S). All ranks call it together and return the same."""
    job.model.eval()
    (ids, labels), hits, lost, count = pairs, torch.zeros(1, dtype=torch.int64), 0.0, 0
    step = max(1, BATCH_TOKENS // ids.shape[1])
    for a in range(0, len(ids), step):
        batch = job.share({"input_ids": ids[a : a + step], "shift_labels": labels[a : a + step]})
        found, here = job.model(**batch), int((labels[a : a + step] != IGNORED).sum())
        lost, count = lost + float(found.loss) * here, count + here
        if found.logits is not None:
            hits += (found.logits.argmax(-1) == batch["labels"]).sum().cpu()
    exact = None if job.tiles is not None else int(torch.cat(job.gather(hits)).sum()) / count
    return Measured(ids.shape[1], lost / count, exact)
