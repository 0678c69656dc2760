"""What held-out sequences say: their mean loss and, where few labels count, how many are met exactly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from ringctx.config import Config
from ringctx.core.header import share
from ringctx.core.layout import Layout
from ringctx.training.batch import IGNORED, Batch
from ringctx.training.data import Pairs
from ringctx.training.step import Trainer

BATCH_TOKENS = 16_384
"""Tokens that are measured at once, on all ranks together."""


@dataclass(frozen=True)
class Measured:
    """length: tokens of a sequence. loss: the mean of -log p over all labels. exact: the share of labels that are the likeliest token."""

    length: int
    loss: float
    exact: float | None


@torch.no_grad()
def held_out(config: Config, trainer: Trainer, pairs: Pairs) -> Measured:
    """Measure these sequences, ids and labels (b S). All ranks call it together and return the same."""
    trainer.model.eval()
    ring, length = trainer.ring, pairs[0].shape[1]
    layout = getattr(Layout, config.layout.kind)(length, ring.size)
    step = max(1, BATCH_TOKENS // length)
    total = torch.zeros(3, dtype=torch.float64, device=trainer.device)
    for a in range(0, len(pairs[0]), step):
        batch = Batch.of(pairs[0][a : a + step], pairs[1][a : a + step], layout, ring.rank, trainer.device)
        with trainer.context.running(layout):
            logits = trainer.model(input_ids=batch.ids, position_ids=batch.positions, use_cache=False).logits.flatten(0, 1)
        labels = batch.labels.flatten()
        lost = cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")
        hits = (logits.argmax(-1) == labels).sum()
        total += torch.stack((lost.double(), hits.double(), (labels != IGNORED).sum().double()))
    lost, hits, count = torch.stack(share(ring, total, "losses")).sum(0).tolist()
    return Measured(length, lost / count, hits / count)
