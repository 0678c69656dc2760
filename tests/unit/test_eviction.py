"""Policies keep what their papers say, ties go to the lower index, memory shrinks, and the rest is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ringctx.config import parse
from ringctx.core.attention import Attention
from ringctx.core.decode import decode_attention
from ringctx.core.explicit import Keys
from ringctx.core.layout import Layout
from ringctx.core.ring import Ring
from ringctx.core.visiting import attend_explicit, sums_explicit
from ringctx.errors import ConfigError, LayoutError, Unsupported
from ringctx.huggingface import Context
from ringctx.methods.eviction import H2O, Duo, Held, PyramidKV, SnapKV, Streaming, TopK, keep, parted
from ringctx.methods.rotary import Rotary
from ringctx.patterns import causal, per_head, window
from ringctx.runtime.cache import KVCache
from ringctx.runtime.evict import Evictor
from ringctx.testing import dense, golden_inputs
from tests import virtual

ALONE = Ring.alone()
Q, K, V, _ = golden_inputs()


def held(policy_length: int = 64, mass: Tensor | None = None, num_voters: int = 0, layer: int = 0) -> Held:
    n = policy_length
    indices = torch.arange(n).expand(1, 2, n)
    mass = torch.zeros(1, 2, n) if mass is None else mass
    return Held(ALONE, layer, 2, n, (0, 1), K[:, :n], V[:, :n], indices, mass, num_voters)


def run(policy, num_read: int, num_new: int, **options) -> KVCache:
    """The cache after a prompt of the golden inputs and some tokens more."""
    context = Context(ALONE, evictor=Evictor(policy, 1, prompt=range(num_read)))
    cache, layout = KVCache(1, 0, 1, page=4, **options), Layout.contiguous(num_read, 1)
    cache.extend(layout)
    with context.running(layout, cache):
        context.attend(0, Q[:, :num_read], K[:, :num_read], V[:, :num_read], Attention())
    step(context, cache, range(num_read, num_read + num_new))
    return cache


def step(context: Context, cache: KVCache, tokens: range) -> Tensor:
    outs = []
    for n in tokens:
        cache.grow()
        with context.running(cache=cache, decoding=True):
            outs.append(context.attend(0, Q[:, n : n + 1], K[:, n : n + 1], V[:, n : n + 1], Attention()))
    return torch.cat(outs, 1) if outs else Q[:, :0]


def left(cache: KVCache, head: int) -> list[int]:
    """Indices that are left of a head."""
    (found,) = (part.indices[0, part.heads.index(head)] for part in cache.parts(0) if head in part.heads)
    return sorted(found[found >= 0].tolist())


def test_streaming_leaves_the_golden_keys_for_the_next_query():
    assert [*left(run(Streaming(2, 4), 11, 0), 0), 11] == [0, 1, 8, 9, 10, 11]


def test_h2o_keeps_the_golden_keys_with_the_golden_sums():
    assert left(run(H2O(4, 4), 16, 0), 0) == [0, 1, 4, 5, 12, 13, 14, 15]
    cache = run(H2O(4, 4), 16, 8)
    assert left(cache, 0) == [0, 1, 4, 5, 20, 21, 22, 23]
    (part,), (mass,) = cache.parts(0), cache.masses(0)
    got = sorted(zip(part.indices[0, 0].tolist(), mass[0, 0].tolist(), strict=True))
    want = [3.144615, 2.656068, 2.548287, 2.519888, 0.667186, 0.510123, 0.362343, 0.179844]
    assert_close(torch.tensor([x for j, x in got if j >= 0]), torch.tensor(want), atol=1e-6, rtol=0)


def test_snapkv_keeps_the_golden_keys():
    assert left(run(SnapKV(16, window=8), 64, 0), 0) == [2, 3, 4, 5, 6, 7, 23, 41, *range(56, 64)]


def test_snapkv_keeps_all_of_a_short_prompt():
    assert not run(SnapKV(16, window=8), 16, 0).is_evicted(0)


def test_pyramidkv_has_the_golden_budgets():
    long, short = PyramidKV(2048, window=64), PyramidKV(512, window=64)
    assert [long.budget(n, 8, 32768) for n in range(8)] == [3994, 3438, 2882, 2326, 1770, 1214, 658, 102]
    assert [short.budget(n, 8, 4096) for n in range(8)] == [512] * 8


def test_top_k_takes_a_function_or_a_table():
    table = torch.rand(2, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    want = [sorted(row.topk(5).indices.tolist()) for row in table]
    for by in (table, table[None], lambda keys, values, indices: table.expand(1, 2, 64)):
        cache = run(TopK(5, by), 64, 0)
        assert [left(cache, head) for head in range(2)] == want
    assert left(run(TopK(3, -torch.arange(64.0)), 64, 0), 1) == [0, 1, 2]


def test_a_table_that_is_too_short_says_so():
    with pytest.raises(ConfigError, match=r"table \(63,\) does not reach 64 tokens"):
        TopK(5, torch.zeros(63)).score(held())
    with pytest.raises(ConfigError, match=r"takes a table \(S\), \(g S\) or \(b g S\)"):
        TopK(5, torch.zeros(()))


def _choose(ring, scores: Tensor, indices: Tensor, budget: int) -> tuple[list, Tensor]:
    mine = slice(ring.rank, None, ring.size)
    kept, number, _ = keep(ring, scores[..., mine], indices[..., mine], budget)
    return [[indices[b, g, mine][kept[b, g]].tolist() for g in range(2)] for b in range(2)], number


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_ties_infinities_and_nan_are_settled_alike_on_any_ranks(size):
    generator = torch.Generator().manual_seed(size)
    for budget in (0, 1, 3, 8, 15, 22, 30):
        scores = torch.randint(0, 4, (2, 2, 23), generator=generator).double()
        scores[0, 0, ::3], scores[0, 1, :9], scores[1, 0, 5], scores[1, 1, 7] = torch.inf, torch.inf, torch.nan, -torch.inf
        indices = torch.randperm(23, generator=generator).expand(2, 2, 23).clone()
        indices[1, 0, 4:9] = -1
        ranks = virtual.run(_choose, scores, indices, budget, size=size)
        for b in range(2):
            for g in range(2):
                value = lambda n, row=scores[b, g]: -float(row[n].nan_to_num(torch.finfo(torch.float64).min, torch.inf, -torch.inf))
                may = [n for n in range(23) if indices[b, g, n] >= 0 and scores[b, g, n] != -torch.inf]
                order = sorted(may, key=lambda n: (value(n), int(indices[b, g, n])))
                number = max(min(budget, len(order)), sum(value(n) == -torch.inf for n in order))
                assert sorted(j for kept, _ in ranks for j in kept[b][g]) == sorted(int(indices[b, g, n]) for n in order[:number])
                assert all(int(n[b, g]) == number for _, n in ranks)


def test_heads_that_keep_different_numbers_part_and_memory_shrinks():
    assert parted(torch.tensor([[3, 9, 3], [3, 9, 3]])) == [[0, 2], [1]]
    whole = run(TopK(64, torch.zeros(64)), 64, 0).bytes
    assert run(H2O(4, 4), 64, 0).bytes <= whole // 4
    duo = run(Duo(2, 4, frozenset({(0, 1)})), 60, 4)
    assert [len(part.heads) for part in duo.parts(0)] == [1, 1]
    assert left(duo, 0) == list(range(64)) and left(duo, 1) == [0, 1, 61, 62, 63]
    assert duo.bytes <= whole * 0.8
    cache = run(Streaming(2, 6), 16, 40)
    assert cache.bytes <= whole // 3  # it never holds more than a page beyond what is kept


def test_bf16_keys_are_not_rounded_again_and_quantised_ones_are_refused():
    cache = run(H2O(4, 4), 24, 8, storage="bf16")
    (part,) = cache.parts(0)
    filled = part.indices[0, 0] >= 0
    assert torch.equal(part.k[0, filled, 0], K[0, part.indices[0, 0][filled], 0].bfloat16().double())
    with pytest.raises(Unsupported, match="in int8 would be rounded again"):
        run(H2O(4, 4), 24, 0, storage="int8")


def test_decoding_from_explicit_indices_is_the_definition():
    indices = torch.stack((torch.tensor([9, 0, 63, -1, 5]), torch.tensor([63, 2, -1, -1, 60])))[None]
    slots = indices.clamp(min=0)
    k, v = (torch.stack([x[0, slots[0, g], g] for g in range(2)], 1)[None] for x in (K, V))
    k[0, 3], v[0, 3] = 100.0, 100.0  # of empty slots nothing is seen
    attention = Attention(per_head({causal(): [0], causal() & window(4): [1]}), encoding=Rotary((1.0, 0.1)), sink=torch.tensor([0.1, 0.2]))
    out = decode_attention(Q[:, 63:], k, v, key_layout=Layout.contiguous(64, 1), ring=ALONE, attention=attention, key_indices=indices)
    for g, kept in ((0, [0, 5, 9, 63]), (1, [2, 60, 63])):
        want = dense(attention, Q[:, 63:], K[:, kept], V[:, kept], i=torch.tensor([63]), j=torch.tensor(kept)).out
        assert_close(out[:, :, g], want[:, :, g])


def test_half_precision_rows_and_sums_are_near_the_definition():
    indices = torch.arange(64).expand(1, 2, 64)
    q, k, v = (x.bfloat16() for x in (Q, K, V))
    parts = [Keys((0, 1), k, v, indices)]
    total = attend_explicit(q, parts, i=torch.arange(64), ring=ALONE, attention=Attention())
    want = dense(Attention(), q, k, v)
    assert_close(total.out.double(), want.out, atol=2e-2, rtol=0)
    (given,) = sums_explicit(q, total.lse, parts, i=torch.arange(64), ring=ALONE, attention=Attention())
    assert_close(given.sum(-1), torch.full((1, 2), 64.0), atol=1e-3, rtol=0)


def test_what_is_dropped_comes_back_when_a_mark_is_restored():
    policy = H2O(4, 4)
    context = Context(ALONE, evictor=Evictor(policy, 1))
    cache = run(policy, 20, 3)
    before, kept, mark = cache.parts(0)[0], left(cache, 0), cache.mark()
    first = step(context, cache, range(23, 40))
    assert left(cache, 0) != kept
    cache.restore(mark)
    assert torch.equal(cache.parts(0)[0].k, before.k) and left(cache, 0) == kept
    assert torch.equal(step(context, cache, range(23, 40)), first)


def test_keys_of_an_evicted_layer_are_read_by_parts_alone():
    with pytest.raises(LayoutError, match="Tokens of layer 0 were evicted.*ask for its parts"):
        run(H2O(4, 4), 24, 0).read(0)


def test_parts_that_do_not_fit_are_refused():
    indices = torch.arange(64).expand(1, 2, 64)
    with pytest.raises(LayoutError, match=r"The parts have key heads \[0, 2\]"):
        attend_explicit(Q, [Keys((0, 2), K, V, indices)], i=torch.arange(64), ring=ALONE, attention=Attention())
    with pytest.raises(LayoutError, match=r"have indices \(1, 2, 63\)"):
        attend_explicit(Q, [Keys((0, 1), K, V, indices[..., 1:])], i=torch.arange(64), ring=ALONE, attention=Attention())
    with pytest.raises(Unsupported, match=r"not attended with Attention\(dropout=...\)"):
        attend_explicit(Q, [Keys((0, 1), K, V, indices)], i=torch.arange(64), ring=ALONE, attention=Attention(dropout=0.1))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Streaming(-1, 4), "sinks -1; it must be at least 0"),
        (lambda: Streaming(1, 0), "recent 0; it must be at least 1"),
        (lambda: H2O(0, 0), "at least 1"),
        (lambda: SnapKV(8, window=8), "keep more than that"),
        (lambda: SnapKV(16, window=8, kernel=4), "it must be odd"),
        (lambda: TopK(0, torch.zeros(3)), "keys 0"),
    ],
)
def test_policies_that_keep_nothing_sensible_are_refused(make, says):
    with pytest.raises(ConfigError, match=says):
        make()


@pytest.mark.parametrize(
    ("evict", "more", "says"),
    [
        ("{heavy: 3}", "", "cache.evict.heavy means nothing with kind none; leave it out, or set kind to h2o"),
        ("{each_chunk: true}", "", "each_chunk means nothing with kind none"),
        ("{kind: streaming, keys: 30}", "", "keys means nothing with kind streaming.*snapkv, pyramidkv"),
        ("{kind: duo}", "", "written layer.head, such as '0.1'"),
        ("{kind: duo, streaming: ['1']}", "", "written layer.head"),
        ("{kind: h2o, heavy: 0, recent: 0}", "", "keep at least 1"),
        ("{kind: snapkv, keys: 32}", "", "keep more than the window"),
        ("{kind: snapkv, kernel: 2}", "", "it must be odd"),
        ("{kind: streaming, recent: 0}", "", "recent is 0; it must be at least 1"),
        ("{kind: h2o}", ", storage: int8", "rounded again where others are evicted"),
        ("{kind: h2o}", ", storage: auto, memory_gib: 1", "rounded again where others are evicted"),
    ],
)
def test_settings_that_mean_nothing_are_refused(evict, more, says):
    with pytest.raises(ConfigError, match=says):
        parse(f"cache: {{evict: {evict}{more}}}")


def engine(evict: str, *overrides: str):
    from ringctx.runtime.engine import Engine

    text = "model: {path: random-tiny, dtype: float32, device: cpu}\ngeneration: {max_new_tokens: 24}\n"
    return Engine.load(parse(text + f"cache: {{evict: {evict}, page: 8}}", overrides), ALONE)


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("chunks", [(), ("layout.chunk=20", "cache.evict.each_chunk=false")], ids=["whole", "chunks"])
def test_streaming_says_what_a_window_with_sinks_says(chunks):
    pytest.importorskip("transformers")
    text, seen = "In the beginning " * 9, ("attention.window=12", "attention.sinks=2")
    want = engine("{}", *seen, *chunks[:1]).generate(text, "Who?").tokens
    assert engine("{kind: streaming, sinks: 2, recent: 12}", *seen, *chunks).generate(text, "Who?").tokens == want


@pytest.mark.usefixtures("own_cache")
def test_a_streaming_head_that_the_model_has_not_is_refused():
    pytest.importorskip("transformers")
    with pytest.raises(ConfigError, match=r"streaming names 99.0, but the model has layers 0 to"):
        engine("{kind: duo, streaming: ['0.0', '99.0']}")


@pytest.mark.usefixtures("own_cache")
def test_a_document_that_was_read_once_answers_twice_and_snapshots_of_it_are_refused(tmp_path):
    pytest.importorskip("transformers")
    from ringctx.runtime.answer import Folders

    ours = engine("{kind: snapkv, keys: 24, window: 4}")
    prompt = ours.prompts.whole("In the beginning " * 9, "Who?")
    reading = ours.read(prompt[:-6])
    first = ours.answer(reading, prompt).tokens
    assert ours.answer(reading, prompt).tokens == first
    with pytest.raises(ConfigError, match=r"cache.evict.kind is snapkv; leave --save and --resume out"):
        ours.generate("In the beginning", "Who?", folders=Folders(save=tmp_path))
