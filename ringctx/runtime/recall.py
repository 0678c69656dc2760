"""Recall: of a long text that was read, the few blocks that a question needs, found once a question.

The question is read over the text's beginning and end alone; what some heads ask for there is compared with every key between.
The blocks of tokens that answer best, with beginning and end, become a cache of their own, at consecutive positions, on the
ranks where they lie. The answer is attention over that small cache, exact, at a cost that does not grow with the text.
No key is sent: of every block the ranks share one number for each head that is listened to.

A block's score is the sum, over those heads, of the largest share of a token's attention that one key of the block would have,
if all keys lay DISTANCE tokens back.
Sources: blocks stood for by their best keys as in InfLLM (Xiao et al. 2024, arXiv 2402.04617); retrieval heads (Wu et al. 2024,
arXiv 2404.15574); positions counted in the cache as in StreamingLLM (Xiao et al. 2023, arXiv 2309.17453).
Letters: t tokens of the question, n keys here, h query heads, g key heads, d head dim.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ringctx.config import CacheConfig, RecallConfig
from ringctx.core.attention import Attention, scale_of
from ringctx.core.header import share
from ringctx.core.layout import Ranges, count, join
from ringctx.core.ring import Ring
from ringctx.errors import ConfigError
from ringctx.huggingface import Context
from ringctx.runtime.cache import KVCache

logger = logging.getLogger(__name__)

DISTANCE = 300
"""How many tokens before the question every key is taken to lie: near enough for heads that find things, too far for grammar."""
AT_ONCE = 65_536
"""Keys that are read and compared at a time."""
KIND = "recall"
"""What the traffic counters call these bytes."""

Head = tuple[int, int]
"""A layer and a query head of it."""


@dataclass
class Asking:
    """What the question's tokens ask for: scaled queries of the heads that are listened to, turned to DISTANCE, and their key heads."""

    heads: tuple[Head, ...]
    _queries: dict[Head, list[Tensor]] = field(default_factory=dict)
    _key_heads: dict[Head, int] = field(default_factory=dict)

    @property
    def last_layer(self) -> int:
        """No later layer is listened to."""
        return max(layer for layer, _ in self.heads)

    def hear(self, layer: int, q: Tensor, k: Tensor, attention: Attention) -> None:
        """q (1 t h d) and k (1 t g d), before rotation: some more tokens of the question."""
        wanted = [head for head in self.heads if head[0] == layer]
        if wanted and attention.encoding is not None:
            q = attention.encoding.queries(q, torch.full((q.shape[1],), DISTANCE, device=q.device))
        for head in wanted:
            self._queries.setdefault(head, []).append(q[0, :, head[1]] * scale_of(attention, q.shape[-1]))
            self._key_heads[head] = head[1] * k.shape[2] // q.shape[2]

    def logits(self, head: Head, k: Tensor) -> Tensor:
        """Keys k (1 n g d) before rotation -> (t n), in fp32."""
        return (torch.cat(self._queries[head]) @ k[0, :, self._key_heads[head]].T).float()


def heads_of(config: RecallConfig, model: Any) -> tuple[Head, ...]:
    """The heads that are listened to: those named, or all. Raises ConfigError for heads that the model does not have."""
    num_layers, num_heads = int(model.config.num_hidden_layers), int(model.config.num_attention_heads)
    everyone = tuple((layer, head) for layer in range(num_layers) for head in range(num_heads))
    named = tuple((layer, head) for layer, head in config.heads)
    for layer, head in set(named) - set(everyone):
        raise ConfigError(
            f"cache.recall.heads names head {head} of layer {layer}, but the model has layers 0 to {num_layers - 1} of {num_heads} heads "
            "each; name heads that there are, or none for all."
        )
    return named or everyone


@torch.no_grad()
def recall(
    config: CacheConfig, model: Any, context: Context, cache: KVCache, text: list[int], question: list[int]
) -> tuple[KVCache, list[int]]:
    """A small cache with what the question needs of the text, and the tokens that are to be read after it: the question's.

    text: the tokens in the cache. Where blocks are read anew, the small cache is empty and their tokens come before the question's.
    All ranks call it together, inside `context.recalling()`.
    """
    asking = heard(config, model, context, cache, question)
    kept = chosen(config.recall, asking, cache, context.ring)
    where = " ".join(f"{r.start}-{r.stop - 1}" for r in kept)
    logger.info("%d of %d tokens are recalled: %s.", count(kept), cache.layout.length, where)
    if config.recall.reread:
        return cache.holding(()), [*(text[i] for r in kept for i in r), *question]
    return cache.holding(kept), question


@torch.no_grad()
def heard(config: CacheConfig, model: Any, context: Context, cache: KVCache, question: list[int]) -> Asking:
    """What the question asks for, read after the ends of what is cached. All ranks call it together, inside `context.recalling()`."""
    asking = Asking(heads_of(config.recall, model))
    small = cache.holding(ends(config.recall, cache.layout.length))
    context.asked = asking.hear
    try:
        for part in (question[a : a + config.page] for a in range(0, len(question), config.page)):
            begin = small.layout.length
            small.grow(len(part))
            ids, positions = (torch.tensor([x], device=model.device) for x in (part, range(begin, begin + len(part))))
            with context.caching(None, small, asking.last_layer, decoding=True):
                model.base_model(input_ids=ids, position_ids=positions, use_cache=False)
    finally:
        context.asked = None
    return asking


def ends(config: RecallConfig, length: int) -> Ranges:
    """The text's first and last tokens, which every question sees."""
    first = min(config.sinks, length)
    return join((range(first), range(max(length - config.recent, first), length)))


def between(config: RecallConfig, length: int) -> range:
    """The tokens between the text's ends, whose blocks are compared; empty where there are none."""
    kept = ends(config, length)
    return range(kept[0].stop, kept[1].start) if len(kept) == 2 else range(length, length)


def chosen(config: RecallConfig, asking: Asking, cache: KVCache, ring: Ring) -> Ranges:
    """The indices that a question is answered from: the text's ends and the blocks that answer best. The same on every rank.

    All ranks call it together.
    """
    kept, middle = ends(config, cache.layout.length), between(config, cache.layout.length)
    if not middle:
        return kept
    best = ranked(shares(config, asking, cache, ring).sum(0))[: config.blocks]
    spread = [(middle.start + n * config.block - config.margin, middle.start + (n + 1) * config.block + config.margin) for n in best]
    blocks = sorted((max(a, middle.start), min(b, middle.stop)) for a, b in spread)
    parts, at = [kept[0]], middle.start
    for a, b in blocks:
        parts.append(range(max(a, at), b))
        at = max(at, b)
    return join([*parts, kept[1]])


def ranked(scores: Tensor) -> list[int]:
    """The numbers of the blocks of these scores (blocks), best first, at a tie the earlier."""
    values = scores.tolist()
    return sorted(range(len(values)), key=lambda n: (-values[n], n))


@torch.no_grad()
def shares(config: RecallConfig, asking: Asking, cache: KVCache, ring: Ring) -> Tensor:
    """Each head's score of each block of the tokens between the ends, (heads, blocks), the same on every rank.

    All ranks call it together; there are tokens between the ends.
    """
    middle, indices = between(config, cache.layout.length), cache.layout.indices(ring.rank)
    first, last = (int((indices < edge).sum()) for edge in (middle.start, middle.stop))  # a rank's tokens ascend
    blocks = (indices[first:last] - middle.start) // config.block
    num_blocks = -(-len(middle) // config.block)
    best, total = zip(*(_compared(asking, head, cache, first, blocks, num_blocks) for head in asking.heads), strict=True)
    whole = torch.stack(share(ring, torch.stack(total), KIND)).logsumexp(0)  # (heads, t), over all ranks' keys
    mine = (torch.stack(best) - whole[..., None]).amax(1)
    return torch.stack(share(ring, mine, KIND)).amax(0).exp()


def _compared(asking: Asking, head: Head, cache: KVCache, first: int, blocks: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    """One head's largest logit in each block, (t blocks), and the log of the sum of all their exp, (t); of this rank's keys.

    blocks: of which block the keys are that lie from place `first` on, (n) int64.
    """
    best = total = None
    for a in range(0, max(len(blocks), 1), AT_ONCE):
        here = blocks[a : a + AT_ONCE]
        k, _ = cache.read(head[0], ((first + a, first + a + len(here)),))
        logits = asking.logits(head, k)
        if best is None or total is None:
            best = logits.new_full((len(logits), num_blocks), -torch.inf)
            total = logits.new_full((len(logits),), -torch.inf)
        best.scatter_reduce_(1, here.to(k.device).expand(len(logits), -1), logits, "amax")
        total = torch.logaddexp(total, logits.logsumexp(1))
    assert best is not None and total is not None
    return best, total
