"""Recall: the blocks are those of a plain definition, their keys are the text's own, and an answer from all blocks is the dense one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from ringctx.config import CacheConfig, RecallConfig, parse
from ringctx.core.attention import Attention
from ringctx.core.layout import Layout
from ringctx.core.ring import Ring
from ringctx.errors import ConfigError
from ringctx.methods.rotary import Rotary
from ringctx.runtime import recall
from ringctx.runtime.answer import Listener
from ringctx.runtime.cache import KVCache
from ringctx.runtime.engine import Engine
from ringctx.runtime.recall import DISTANCE, Asking, chosen, ends, heads_of
from ringctx.runtime.storage import KINDS

pytestmark = pytest.mark.usefixtures("own_cache")

DOCUMENT = "In the beginning God created the heaven and the earth. " * 8
CONFIG = RecallConfig(blocks=3, block=4, margin=0, sinks=2, recent=5, heads=((0, 1), (1, 3)))
ROTARY = Rotary((1.0, 0.1))


def engine(*overrides: str) -> Engine:
    return Engine.load(parse("model: {path: random-tiny, dtype: float32, device: cpu}", overrides), Ring.alone())


def filled(n: int, layout: Layout | None = None, rank: int = 0, storage: str = "model") -> tuple[KVCache, Tensor]:
    """A cache of two layers of this rank's share of n keys (1 n 2 4), and the whole keys of both layers (2 n 2 4)."""
    layout = layout or Layout.contiguous(n, 1)
    keys = torch.randn(2, n, 2, 4, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    cache = KVCache(2, rank, layout.size, page=16, storage=storage)
    cache.extend(layout)
    for layer in range(2):
        own = layout.shard(keys[layer][None], rank)
        cache.append(layer, own, -own)
    return cache, keys


def heard(config: RecallConfig = CONFIG) -> tuple[Asking, Tensor]:
    """What five tokens ask for in two layers of four heads, and their queries (2 5 4 4)."""
    queries = torch.randn(2, 5, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    asking = Asking(config.heads)
    for part in (slice(0, 2), slice(2, 5)):
        for layer in range(2):
            asking.hear(layer, queries[layer][None, part], torch.zeros(1, 1, 2, 1), Attention(encoding=ROTARY))
    return asking, queries


def defined(config: RecallConfig, queries: Tensor, keys: Tensor) -> list[int]:
    """The blocks by the definition, from whole tensors."""
    n = keys.shape[1]
    far = range(config.sinks, n - config.recent)
    scores = torch.zeros(-(-len(far) // config.block), dtype=torch.float64)
    for layer, head in config.heads:
        q = ROTARY.queries(queries[layer][None], torch.full((5,), DISTANCE))[0, :, head]
        shares = (q @ keys[layer, far.start : far.stop, head // 2].T / 2).float().softmax(-1).double()
        scores += torch.stack([part.amax() for part in shares.split(config.block, dim=1)])
    return sorted(sorted(range(len(scores)), key=lambda b: (-scores[b], b))[: config.blocks])


@pytest.mark.parametrize("n", [8, 9, 20, 61, 200])
@pytest.mark.parametrize("at_once", [7, 10_000])
def test_blocks_are_those_of_the_definition(n, at_once, monkeypatch):
    monkeypatch.setattr(recall, "AT_ONCE", at_once)
    cache, keys = filled(n)
    asking, queries = heard()
    blocks = [range(2 + 4 * b, min(6 + 4 * b, n - 5)) for b in defined(CONFIG, queries, keys)]
    want = [*range(2), *(i for block in blocks for i in block), *range(n - 5, n)]
    assert [i for r in chosen(CONFIG, asking, cache, Ring.alone()) for i in r] == want


def test_margins_reach_over_borders_and_do_not_double():
    cache, _ = filled(61)
    asking, _ = heard()
    plain, wide = ([i for r in chosen(replace(CONFIG, margin=m), asking, cache, Ring.alone()) for i in r] for m in (0, 3))
    far = set(range(2, 56))
    assert set(wide) == set(plain) | {j for i in set(plain) & far for j in range(i - 3, i + 4) if j in far}
    assert wide == sorted(set(wide))


@pytest.mark.parametrize(
    ("length", "want"), [(0, []), (1, [0]), (6, [0, 1, 2, 3, 4, 5]), (7, [0, 1, 2, 3, 4, 5, 6]), (9, [0, 1, 4, 5, 6, 7, 8])]
)
def test_ends_of_short_texts_do_not_overlap(length, want):
    assert [i for r in ends(CONFIG, length) for i in r] == want


@pytest.mark.parametrize("storage", KINDS)
@pytest.mark.parametrize("size", [1, 3])
def test_what_is_held_is_what_lies_at_those_indices(storage, size):
    layout = Layout.zigzag(50, size)
    kept = (range(2), range(11, 20), range(43, 50))
    indices = torch.cat([torch.arange(r.start, r.stop) for r in kept])
    for rank in range(size):
        cache, _ = filled(50, layout, rank, storage)
        small = cache.holding(kept)
        own = torch.isin(layout.indices(rank), indices)
        assert small.layout.length == 18
        assert torch.equal(indices[small.layout.indices(rank)], layout.indices(rank)[own])
        for layer in range(2):
            for got, whole in zip(small.read(layer), cache.read(layer), strict=True):
                assert torch.equal(got, whole[:, own])


@pytest.mark.parametrize("setting", ["layout.chunk=null", "layout.chunk=64", "layout.kind=striped"])
@pytest.mark.parametrize("reread", ["true", "false"])
def test_an_answer_from_all_blocks_is_the_answer_from_the_whole(setting, reread):
    all_of_it = f"cache.recall={{blocks: 1000, block: 8, margin: 3, sinks: 3, recent: 9, heads: [[1, 2]], reread: {reread}}}"
    ours, theirs = engine(setting, all_of_it), engine(setting)
    assert ours.generate(DOCUMENT, "Who?").tokens == theirs.generate(DOCUMENT, "Who?").tokens


@pytest.mark.parametrize("reread", ["true", "false"])
def test_questions_leave_the_reading_as_it_was(reread):
    recalls = f"cache.recall={{blocks: 2, block: 8, margin: 1, sinks: 3, recent: 9, heads: [[0, 0]], reread: {reread}}}"
    ours = engine(recalls, "generation.max_new_tokens=6")
    reading = ours.read(ours.prompts.opening(DOCUMENT))
    before = [x.clone() for x in reading.cache.read(1)]
    prompts = [ours.prompts.whole(DOCUMENT, question) for question in ("Who?", "What was created?", "Who?")]
    first, second, again = (ours.answer(reading, prompt) for prompt in prompts)
    assert first.tokens == again.tokens and first.prompt_tokens == len(prompts[0]) and len(second.tokens) <= 6
    assert all(map(torch.equal, before, reading.cache.read(1)))
    assert not ours.context.recalled and ours.context.asked is None


def test_blocks_that_are_read_anew_answer_as_a_text_of_these_blocks():
    """The prompt is as long as the blocks and the question."""
    ours = engine("cache.recall={blocks: 2, block: 8, margin: 1, sinks: 3, recent: 9, heads: [[0, 0]]}", "generation.max_new_tokens=6")
    reading, prompt = ours.read(ours.prompts.opening(DOCUMENT)), ours.prompts.whole(DOCUMENT, "Who?")
    heard: list[tuple[int, int]] = []
    answer = ours.answer(reading, prompt, Listener(began=lambda *n: heard.append(n)))
    ((num_read, _),) = heard
    rest = prompt[len(reading.tokens) :]
    assert 3 + 9 + 8 <= num_read - len(rest) <= 3 + 9 + 2 * (8 + 2)
    with ours.context.recalling():
        _, shorter = recall.recall(ours.config.cache, ours.model, ours.context, reading.cache, reading.tokens, rest)
    assert shorter[-len(rest) :] == rest and len(shorter) == num_read
    assert answer.tokens == engine("generation.max_new_tokens=6").complete(shorter).tokens


def test_a_window_of_reading_does_not_hide_what_is_recalled(monkeypatch):
    seen = []
    ours = engine("attention.window=8", "attention.sinks=1", "cache.recall={blocks: 2, block: 8, margin: 0, sinks: 3, recent: 20}")
    attend = type(ours.context).attend

    def noted(context, *arguments):
        seen.append((context.recalled, str(arguments[4].pattern)))
        return attend(context, *arguments)

    monkeypatch.setattr(type(ours.context), "attend", noted)
    ours.generate(DOCUMENT, "Who?")
    assert {pattern for recalled, pattern in seen if recalled} == {"causal"}
    assert all("window(8)" in pattern for recalled, pattern in seen if not recalled)
    assert all("window(8)" in str(pattern) for pattern in ours.context.patterns.values())


def test_heads_that_are_not_there_are_refused_before_anything_is_read():
    with pytest.raises(ConfigError, match="names head 9 of layer 1, but the model has layers 0 to 1 of 4 heads each"):
        engine("cache.recall={blocks: 2, heads: [[1, 9]]}")
    assert len(heads_of(RecallConfig(), engine().model)) == 8


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("cache.recall.blocks=-1", "cache.recall.blocks is -1; it must be at least 0"),
        ("cache.recall.sinks=0", "cache.recall.sinks is 0; it must be at least 1"),
        ("cache.recall.heads=[[1]]", r"cache.recall.heads holds \[1\]; each head is written \[layer, query head\]"),
        ("cache.recall.heads=[1]", r"cache.recall.heads\[0\] is 1, a whole number; it must be a list of whole numbers"),
        ("cache={recall: {blocks: 1}, evict: {kind: streaming, sinks: 1, recent: 4}}", "set one of them, not both"),
    ],
)
def test_what_cannot_be_meant_is_refused(setting, sentence):
    with pytest.raises(ConfigError, match=sentence):
        parse("", [setting])


def test_a_configuration_without_blocks_recalls_nothing():
    assert CacheConfig().recall.blocks == 0


def test_where_nothing_was_read_nothing_is_recalled():
    ours, plain = engine("cache.recall.blocks=3"), engine()
    prompt = ours.prompts.chat([{"role": "user", "content": "Who?"}])
    assert ours.answer(ours.read([]), prompt).tokens == plain.answer(plain.read([]), prompt).tokens
