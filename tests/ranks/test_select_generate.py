"""A wrapped model that selects: it reads in chunks and writes the same tokens on one rank and on three."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from ringctx.asked.selecting import KINDS, selecting  # noqa: E402
from ringctx.config import parse  # noqa: E402
from ringctx.core.layout import Layout  # noqa: E402
from ringctx.huggingface import wrap  # noqa: E402
from ringctx.runtime.cache import KVCache  # noqa: E402
from ringctx.tools.eval.density import density  # noqa: E402
from tests.pool import Pool  # noqa: E402

LENGTH, CHUNK, NEW = 150, 80, 6
SELECT = {
    "vertical_slash": "verticals: 5, slashes: 6, last: 8, first: 1, near: 2, tile: 4",
    "a_shape": "initial: 4, local: 20",
    "flex_prefill": "gamma: 0.5, least: 16, block: 8",
    "x_attention": "threshold: 0.6, stride: 4, block: 8",
    "sparge": "similarity: -1, mass: 0.3",
    "quest": "blocks: 3, block: 8",
    "representatives": "blocks: 2, block: 8, initial: 4, local: 8",
    "moba": "blocks: 3, block: 8",
}


@dataclass
class Read:
    """As much of an engine as the density asks for."""

    model: Any
    context: Any


def _generate(ring: Any, kind: str, select: str) -> tuple[list[int], float, float]:
    """The tokens written after a prompt, the density of reading it, and the share of cached keys that the last token saw."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=8, initializer_range=0.4,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config).eval()
        ids = torch.randint(96, (1, LENGTH))
    context = wrap(model, ring, selecting(None, parse(f"attention: {{select: {{kind: {kind}, {select}}}}}").attention.select, 2))
    cache, tokens = KVCache(2, ring.rank, ring.size, page=2), list[int]()
    with torch.no_grad():
        for layout in _chunks(ring.size):
            cache.extend(layout)
            mine = layout.indices(ring.rank)
            with context.running(layout, cache):
                logits = model(input_ids=ids[:, mine], position_ids=mine[None], use_cache=False).logits
        tokens = _from_owner(ring, layout, logits, mine)
        share = density(Read(model, context))
        while len(tokens) < NEW:
            index = cache.layout.length
            cache.grow()
            with context.running(cache=cache, decoding=True):
                asked = torch.tensor([[tokens[-1]]]), torch.tensor([[index]])
                logits = model(input_ids=asked[0], position_ids=asked[1], use_cache=False).logits
            tokens.append(int(logits[0, -1].argmax()))
    last = context.patterns[0].allows(torch.tensor([index]), torch.arange(index + 1)).float().mean()
    return tokens, share, float(last)


def _chunks(size: int) -> Iterator[Layout]:
    for first in range(0, LENGTH, CHUNK):
        yield Layout.zigzag(min(CHUNK, LENGTH - first), size).shifted(first)


def _from_owner(ring: Any, layout: Layout, logits: torch.Tensor, mine: torch.Tensor) -> list[int]:
    from ringctx.core.header import share

    token = int(logits[0, -1].argmax()) if ring.rank == layout.owner(LENGTH - 1) and int(mine[-1]) == LENGTH - 1 else -1
    return [max(int(t) for t in share(ring, torch.tensor([token]), "partials"))]


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_model_that_selects_writes_the_same_tokens_on_one_rank_and_three(pool: Pool, kind: str) -> None:
    ((tokens, share, last),) = pool.run(_generate, kind, SELECT[kind], size=1)
    assert len(tokens) == NEW
    reads, writes = KINDS[kind].prefill, KINDS[kind].decode
    assert (0.05 < share < 0.95) == reads and (share == 1.0) == (not reads)
    assert (last < 0.5) == writes
    for others, dense, seen in pool.run(_generate, kind, SELECT[kind], size=3):
        assert others == tokens
        assert (dense, seen) == (share, last)
