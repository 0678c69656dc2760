"""The contract of every method: its definition on whole tensors, and what is compared with it on ranks, backward, in chunks, decoding."""
