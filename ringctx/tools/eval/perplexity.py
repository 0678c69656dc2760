"""Perplexity: how well a model predicts a text, by how much of it came before."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from ringctx.errors import ConfigError
from ringctx.runtime.engine import Engine, Listener
from ringctx.runtime.talk import share
from ringctx.tools.eval.asked import Row
from ringctx.tools.eval.density import density

PROTOCOL = (
    "One pass over the first N tokens, no stride, no chat template: each token is predicted once, from all tokens before it that "
    "the patterns allow. A row holds the predictions from length/2 + 1 to length tokens of context. nll: mean of -log p in nats. "
    "seconds, density (from the patterns) and bytes are those of the whole pass, the same in every row."
)


@dataclass(frozen=True, kw_only=True)
class PerplexityRow(Row):
    """The predictions from length/2 + 1 to length tokens of context; the last row's may stop before its length."""

    nll: float
    perplexity: float
    tokens: int


def tokens_of(engine: Engine, text: str, length: int) -> list[int]:
    """The text's first tokens, with what the tokenizer puts before any text. Raises ConfigError when there are fewer."""
    tokens: list[int] = engine.tokenizer(text, verbose=False).input_ids
    if length < 2:
        raise ConfigError(f"--length {length} leaves nothing to predict; perplexity needs at least 2 tokens.")
    if len(tokens) < length:
        raise ConfigError(f"--length {length} asks for more than the document's {len(tokens)} tokens; give a longer --document.")
    return tokens[:length]


def run(engine: Engine, tokens: list[int], listener: Listener) -> list[PerplexityRow]:
    """A row for each power of two up to the sequence's length. All ranks call it together and return the same but for `seconds`."""
    began = time.perf_counter()
    engine.ring.traffic.reset()
    indices, losses = engine.losses(tokens, listener)
    ends = [1 << n for n in range((len(tokens) - 2).bit_length() + 1)]
    bucket = torch.bucketize(indices + 1, torch.tensor(ends, device=indices.device))
    sums = losses.new_zeros(len(ends), dtype=torch.float64).index_add(0, bucket, losses.double()).tolist()
    seconds = time.perf_counter() - began
    facts = {"sums": sums, "sent": engine.ring.traffic.sent.total()}
    everyone = share(engine.world, facts, engine.device, "losses of each rank")
    whole = {"seconds": seconds, "density": density(engine, len(tokens)), "bytes": sum(rank["sent"] for rank in everyone)}
    rows = []
    for n, end in enumerate(ends):
        count = min(end, len(tokens) - 1) - end // 2
        nll = sum(rank["sums"][n] for rank in everyone) / engine.context.parts / count
        rows.append(PerplexityRow(length=end, depth=None, correct=None, nll=nll, perplexity=math.exp(nll), tokens=count, **whole))
    return rows
