"""Rings inside transformers' own Trainer, and under PEFT.

    job = ringctx.embed.huggingface.join(model, ring=2)     # before or after get_peft_model
    RingTrainer(job, model=model, args=args, train_dataset=dataset).train()

Trainer splits its batches over all ranks; the ranks of a ring take turns, so every sequence is trained on once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from ringctx.errors import Unsupported
from ringctx.training.job import Job, join

__all__ = ["Job", "RingTrainer", "join"]


class RingTrainer(Trainer):
    """A Trainer whose model was given to `join`. Its loss is the mean over the labels of all ranks, whatever it accumulates.

    Raises Unsupported for what would gather logits, of which every rank has a part, and for what counts ranks as data.
    """

    def __init__(self, job: Job, *, args: TrainingArguments, **named: Any) -> None:
        wants = [name for name in ("compute_metrics", "preprocess_logits_for_metrics", "compute_loss_func") if named.get(name)]
        if wants:
            raise Unsupported(f"RingTrainer was given {', '.join(wants)}, but every rank has the logits of its own tokens; leave that out.")
        if args.label_smoothing_factor:
            raise Unsupported("RingTrainer takes the mean of -log p over all ranks' labels; set label_smoothing_factor to 0.")
        args.prediction_loss_only = True
        self.job = job
        super().__init__(args=args, **named)

    def get_train_dataloader(self) -> Any:
        """Of each batch this rank's share."""
        return self.job.loader(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Of each batch this rank's share."""
        return self.job.loader(super().get_eval_dataloader(eval_dataset))

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> tuple[list[Any], None]:
        """Labels are counted where the loss is computed, over all ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, None

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Tensor | None = None) -> Any:
        """The model's own."""
        out = model(**inputs)
        return (out.loss, out) if return_outputs else out.loss
