"""Blocks of attention by layer and head: over ranks they say what transformers' own eager attention says under such masks."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

pytest.importorskip("transformers")

from ringctx.asked.layers import layers_of
from ringctx.config import parse
from ringctx.core.ring import Ring
from ringctx.huggingface import wrap
from ringctx.runtime.cache import KVCache
from ringctx.runtime.engine import Engine
from ringctx.tools.eval.density import density
from tests.pool import Pool
from tests.reading import read_and_write
from tests.tiny import tiny

READ, WRITTEN, HEADS = 48, 7, 4
IDS = torch.randint(3, 97, (1, READ + WRITTEN), generator=torch.Generator().manual_seed(0))
Streams = dict[tuple[int, int], tuple[int, int]]
"""The window and sinks of a head of a layer; heads left out see all."""
EVERY = range(HEADS)
CASES: dict[str, tuple[str, Streams]] = {
    "all but the last layer": (
        "- {layers: 3}\n- {window: 6}",
        {(layer, head): (6, 0) for layer in range(3) for head in EVERY},
    ),
    "every second layer whole": (
        "- {layers: 0-3:2}\n- {window: 6, sinks: 2}",
        {(layer, head): (6, 2) for layer in (1, 3) for head in EVERY},
    ),
    "streaming heads": (
        "- {layers: 0, heads: 0-2, window: 6, sinks: 2}\n- {layers: '1, 3', heads: 1, window: 4, sinks: 1}\n"
        "- {layers: 2, heads: [0, 3], window: 6, sinks: 2}\n- {layers: 3, window: 20}\n- {}",
        {(0, 0): (6, 2), (0, 1): (6, 2), (0, 2): (6, 2), (1, 1): (4, 1), (3, 1): (4, 1), (2, 0): (6, 2), (2, 3): (6, 2)}
        | {(3, head): (20, 0) for head in (0, 2, 3)},
    ),
}  # fmt: skip


def _eager(kind: str, streams: Streams) -> Tensor:
    """The logits of the whole text, one mask of (heads, tokens, tokens) for every layer, none of it ringctx's."""
    model, i = tiny(kind), torch.arange(IDS.shape[1])
    behind = i[:, None] - i

    def masked(layer: int, module: Any, args: Any, kwargs: Any) -> Any:
        pairs = [streams.get((layer, head), (IDS.shape[1], 0)) for head in EVERY]
        seen = torch.stack([(behind >= 0) & ((behind < width) | (i < first)) for width, first in pairs])
        own = kwargs["attention_mask"]  # the model's own, its windows included
        return args, kwargs | {"attention_mask": torch.zeros(1).masked_fill(~seen, torch.finfo(own.dtype).min) + own.clamp(min=-1e9)}

    for layer, block in enumerate(model.model.layers):
        block.self_attn.register_forward_pre_hook(lambda *a, layer=layer: masked(layer, *a), with_kwargs=True)
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def _run(ring: Any, kind: str, blocks: str, chunk: int, keep_rotated: bool) -> list[tuple[Tensor, Tensor]]:
    model = tiny(kind)
    context = wrap(model, ring, layers_of(parse(f"attention:\n{blocks}").attention, model.config))
    return read_and_write(model, context, KVCache(4, ring.rank, ring.size, 2, keep_rotated), IDS, READ, chunk)


@pytest.mark.parametrize(("size", "chunk", "keep_rotated"), [(1, 20, True), (2, READ, False), (3, 20, True), (3, READ, True)], ids=str)
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
@pytest.mark.parametrize("case", CASES)
def test_reading_and_writing_say_what_eager_attention_says_under_such_masks(
    pool: Pool, case: str, kind: str, size: int, chunk: int, keep_rotated: bool
) -> None:
    blocks, streams = CASES[case]
    want = _eager(kind, streams)
    assert not torch.allclose(want, _eager(kind, {}), atol=1e-2)
    seen = set()
    for found in pool.run(_run, kind, blocks, chunk, keep_rotated, size=size):
        for indices, logits in found:
            assert_close(logits, want[:, indices], atol=1e-4 * float(want.abs().max()), rtol=0)
            seen |= set(indices.tolist())
    assert seen == set(range(READ + WRITTEN))


def _generate(ring: Ring, cache: str, blocks: str, *settings: str) -> tuple[list[int], float]:
    """The tokens of an answer, and how much of causal attention was computed to read for it."""
    os.environ["XDG_CACHE_HOME"] = cache
    tiny = "model: {path: random-tiny, dtype: float32, device: cpu}\nattention:\n"
    ours = Engine.load(parse(tiny + blocks, ["generation.max_new_tokens=8", *settings]), ring)
    return ours.generate("In the beginning God created the heaven and the earth. " * 3, "Who?").tokens, density(ours)


MOBA = "select: {kind: moba, block: 8, blocks: 2}"
STREAMING = "- {layers: 0, heads: 0-2, window: 8, sinks: 2}\n- {layers: 1, window: 30}\n- {}"
SELECTING = f"- {{layers: 0, heads: 1, window: 40, {MOBA}}}\n- {{layers: 0, {MOBA}}}\n-"


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    ("blocks", "setting"),
    [
        (STREAMING, "layout.chunk=50"),
        (STREAMING, "cache.recall={blocks: 2, block: 8, recent: 9}"),
        (STREAMING, "cache.evict={kind: h2o, heavy: 20, recent: 20}"),
        (SELECTING, "layout.chunk=50"),
        (SELECTING, "cache.recall={blocks: 2, block: 8, recent: 9}"),
    ],
)
def test_an_answer_is_that_of_one_rank(pool: Pool, blocks: str, setting: str, size: int) -> None:
    asked = (os.environ["XDG_CACHE_HOME"], blocks, setting, "layout.kind=contiguous")
    want = _generate(Ring.alone(), *asked)
    assert 0.1 < want[1] < 0.9
    assert pool.run(_generate, *asked, size=size) == [want] * size
