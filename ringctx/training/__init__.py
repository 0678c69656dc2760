"""Training over the ring: shift-then-shard batches, a loss over all tokens, one step that is the same on any number of ranks.

The gradient convention, once: every rank's loss is its own tokens' share of the mean over all labels of the batch (the sum of its
token losses over the count of everybody's labels), so the sum over ranks is the loss, and the *sum* of the ranks' gradients is
its gradient. Nothing is averaged and nothing is scaled by the size of the ring.
"""
