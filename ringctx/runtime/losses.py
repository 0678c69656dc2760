"""Losses: how well a model predicts each token of a sequence that is spread over the ring."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ringctx.core.layout import Layout
from ringctx.runtime.answer import Listener
from ringctx.runtime.cache import KVCache
from ringctx.runtime.engine import Engine

LOGIT_ROWS = 256
"""Tokens whose logits exist at once: 50 MB in fp32 for a vocabulary of 49,152."""


@torch.no_grad()
def token_losses(engine: Engine, tokens: list[int], listener: Listener | None = None) -> tuple[Tensor, Tensor]:
    """How well each of this rank's tokens i predicts token i + 1, which may live on another rank.

    Returns their indices (s,) int64 and -log p of what follows them (s,) float32, both on the engine's device; the
    sequence's last token is left out. All ranks call it together, with the same tokens, of which there are at least 2.
    """
    layouts = engine.chunks(0, len(tokens))
    cache, listener = engine.begin(layouts, 0), listener or Listener()
    listener.began(len(tokens), len(layouts))
    whole = torch.tensor(tokens)
    with engine.timed("prefill", listener):
        parts = [_of_chunk(engine, whole, layout, cache) for layout in layouts]
    indices, found = zip(*parts, strict=True)
    return torch.cat(indices), torch.cat(found)


def _of_chunk(engine: Engine, tokens: Tensor, layout: Layout, cache: KVCache) -> tuple[Tensor, Tensor]:
    """Labels are shifted on the whole sequence, and logits exist for LOGIT_ROWS tokens at a time."""
    cache.extend(layout)
    indices, inputs = engine.inputs(tokens, layout)
    with engine.context.running(layout, cache):
        hidden = engine.model.base_model(**inputs, use_cache=False)
        indices = indices[indices + 1 < len(tokens)]  # only the sequence's last token drops out, and it lies last
        labels = tokens[indices + 1].to(engine.device)
        found = [labels.new_empty(0, dtype=torch.float32)]
        for a in range(0, len(labels), LOGIT_ROWS):
            logits = _logits(engine.model, hidden, slice(a, min(a + LOGIT_ROWS, len(labels))))
            found.append(cross_entropy(logits.float(), labels[a : a + LOGIT_ROWS], reduction="none"))
    return indices.to(engine.device), torch.cat(found)


def _logits(model: Any, hidden: Any, rows: slice) -> Tensor:
    """The logits (n vocabulary) of some rows of the body's output, by the model's own code: some cap or scale them."""
    body, part = model.base_model, type(hidden)(last_hidden_state=hidden.last_hidden_state[:, rows])
    body.forward = lambda *_, **__: part
    try:
        logits: Tensor = model(inputs_embeds=part.last_hidden_state, use_cache=False).logits
    finally:
        del body.forward
    return logits[0]
