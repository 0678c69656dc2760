"""A wrapped model reads a text in chunks, then writes tokens one by one, as the engine has it do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ringctx.core.layout import Layout
from ringctx.huggingface import Context
from ringctx.runtime.cache import KVCache


@torch.no_grad()
def read_and_write(model: Any, context: Context, cache: KVCache, ids: Tensor, read: int, chunk: int) -> list[tuple[Tensor, Tensor]]:
    """Indices and logits: this rank's of the first `read` tokens of ids (1 s), chunk by chunk, then those of the others, on every rank."""
    ring, found = context.ring, []
    for begin in range(0, read, chunk):
        layout = Layout.zigzag(min(chunk, read - begin), ring.size).shifted(begin)
        cache.extend(layout)
        own = layout.indices(ring.rank)
        fed = own if len(own) else torch.zeros(1, dtype=torch.int64)
        with context.running(layout, cache):
            made = model(ids[:, fed], position_ids=fed[None], use_cache=False).logits
        found.append((own, made[:, : len(own)]))
    for n in range(read, ids.shape[1]):
        cache.grow()
        with context.running(cache=cache, decoding=True):
            logits = model(ids[:, n : n + 1], position_ids=torch.tensor([[n]]), use_cache=False).logits
        found.append((torch.tensor([n]), logits))
    return found
