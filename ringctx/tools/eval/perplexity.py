"""Perplexity: how well a model predicts a text, by how much of it came before."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ringctx.errors import ConfigError
from ringctx.runtime.answer import Listener
from ringctx.runtime.engine import Engine
from ringctx.runtime.losses import token_losses
from ringctx.runtime.talk import share
from ringctx.runtime.tokenise import tokenise
from ringctx.tools.eval.asked import Row
from ringctx.tools.eval.cost import counted

ONE_PASS = (
    "One pass over the first N tokens, no stride, no chat template: each token is predicted once, from all tokens before it that "
    "the patterns allow. A row holds the predictions from length/2 + 1 to length tokens of context. nll: mean of -log p in nats. "
    "seconds, density (from the patterns), bytes and memory are those of the whole pass, the same in every row."
)
WINDOWS = (
    "Windows of `length` tokens slide over the first {tokens} tokens by {stride} (as in YaRN, arXiv 2309.00071), no chat "
    "template. Positions begin anew in each window, which nothing before it reaches. Each token but the first is predicted "
    "once, in the first window that holds it: in the first window from 1 to length - 1 tokens of context, later from length "
    "- {stride} to length - 1. nll: mean of -log p in nats over all of them. density: from the patterns, of a window. "
    "seconds and bytes: of all windows."
)


@dataclass(frozen=True, kw_only=True)
class PerplexityRow(Row):
    """Predictions: in one pass, those from length/2 + 1 to length tokens of context, of which the last row's may stop before its
    length; through windows, all of the text's. windows: how many were read."""

    nll: float
    perplexity: float
    tokens: int
    windows: int


def tokens_of(engine: Engine, text: str, count: int, option: str) -> list[int]:
    """The text's first tokens, with what the tokenizer puts before any text. Raises ConfigError when there are fewer; option: who asked."""
    tokens = tokenise(engine.tokenizer, text, special=True)
    if count < 2:
        raise ConfigError(f"{option} {count} leaves nothing to predict; perplexity needs at least 2 tokens.")
    if len(tokens) < count:
        raise ConfigError(f"{option} {count} asks for more than the document's {len(tokens)} tokens; give a longer --document.")
    return tokens[:count]


def one_pass(engine: Engine, tokens: list[int], listener: Listener) -> list[PerplexityRow]:
    """A row for each power of two up to the sequence's length. All ranks call it together and return the same but for the seconds."""
    ends = [1 << n for n in range((len(tokens) - 2).bit_length() + 1)]

    def add_up() -> list[float]:
        indices, losses = token_losses(engine, tokens, listener)
        bucket = torch.bucketize(indices + 1, torch.tensor(ends, device=indices.device))
        sums: list[float] = losses.new_zeros(len(ends), dtype=torch.float64).index_add(0, bucket, losses.double()).tolist()
        return sums

    mine, cost = counted(engine, add_up)
    sums = _everyones(engine, mine)
    counts = [min(end, len(tokens) - 1) - end // 2 for end in ends]
    return [_row(end, total / count, count, 1, cost) for end, total, count in zip(ends, sums, counts, strict=True)]


def through_windows(engine: Engine, tokens: list[int], length: int, stride: int, listener: Listener) -> PerplexityRow:
    """Every token but the first, predicted in the first of the windows that holds it. All ranks call it together.

    1 <= stride < length <= number of tokens, so that what a window adds has a token before it in the window.
    """
    spans = windows(len(tokens), length, stride)

    def add_up() -> list[float]:
        total, done = 0.0, 1
        for begin, end in spans:
            indices, losses = token_losses(engine, tokens[begin:end], listener)
            total += float(losses[indices + 1 + begin >= done].double().sum())
            done = end
        return [total]

    mine, cost = counted(engine, add_up)
    (total,) = _everyones(engine, mine)
    return _row(length, total / (len(tokens) - 1), len(tokens) - 1, len(spans), cost)


def windows(num_tokens: int, length: int, stride: int) -> list[tuple[int, int]]:
    """Where each window begins and ends; the last may be shorter.

    10 tokens, length 5, stride 3: 0-5 3-8 6-10
    """
    num_later = -(-(num_tokens - length) // stride)
    return [(n * stride, min(n * stride + length, num_tokens)) for n in range(num_later + 1)]


def _everyones(engine: Engine, sums: list[float]) -> list[float]:
    """The sums over all ranks; those of a row, with the same tokens, count once."""
    everyone = share(engine.world, sums, engine.device, "losses of each rank")
    return [sum(parts) / engine.context.parts for parts in zip(*everyone, strict=True)]


def _row(length: int, nll: float, tokens: int, num_windows: int, cost: dict[str, Any]) -> PerplexityRow:
    return PerplexityRow(
        length=length, depth=None, correct=None, **cost, nll=nll, perplexity=math.exp(nll), tokens=tokens, windows=num_windows
    )
