"""Training over rings: shift-then-shard batches, the mean loss over all labels, steps that are the same on any number of ranks.

The gradient convention, once: `model(**job.share(batch)).loss` is the mean of -log p over the labels of all ranks, the same number
on each; its gradient on a rank is that rank's share times the number of ranks, so the *average* of the ranks' gradients is the
gradient. That is what DDP, FSDP2 and DeepSpeed do with gradients anyway.
"""
