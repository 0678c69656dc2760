"""Patterns: `judge` against `allows` on every small tile, the goldens of the papers, and every refusal's sentence."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Iterator

import pytest
import torch

from ringctx.core.lines import Lines
from ringctx.core.pattern import CAUSAL, EMPTY, FAR, FULL, PARTIAL, Causal, Pattern, Verdict
from ringctx.core.rules import Chunks
from ringctx.patterns import (
    band,
    blocks,
    causal,
    dilated,
    documents,
    fixed,
    full,
    global_tokens,
    own_block,
    per_head,
    prefix,
    queries_from,
    random_blocks,
    sinks,
    star,
    strided,
    window,
)  # fmt: skip

S = 12
INDEX = torch.arange(S)
RANDOM = torch.Generator().manual_seed(7)
TRIANGLE = torch.ones(S, S).tril().bool()


def tiles(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=RANDOM) < 0.6


STOCK = [
    full(),
    causal(),
    *(window(W) for W in (1, 2, 4, 11, 12, 99)),
    *(sinks(n) for n in (0, 1, 4, 12, 99)),
    *(prefix(n) for n in (0, 1, 2, 5, 12)),
    *(dilated(k) for k in (1, 2, 3, 5, 20)),
    *(band(low, high) for low, high in ((0, 0), (-3, 2), (-7, -4), (2, 5), (-30, 30))),
    *(Chunks(size, count) for size, count in ((1, 1), (3, 1), (3, 2), (5, 2), (4, 9), (20, 1))),
    *(queries_from(first) for first in (0, 1, 5, 12)),
    *(
        random_blocks(size, count, seed)
        for size, count, seed in ((1, 1, 0), (1, 2, 3), (1, 9, 0), (2, 2, 1), (3, 2, 0), (5, 9, 0), (20, 1, 2))
    ),
    *(strided(l) for l in (1, 2, 3, 4, 20)),
    *(fixed(l, c) for l, c in ((1, 1), (2, 1), (3, 2), (4, 1), (4, 3), (5, 5), (20, 2))),
    *(global_tokens(tokens) for tokens in ([0], [3, 4], [11, 0, 5], range(6), range(12))),
    documents([0, 12]),
    documents([0, 5, 9, 12]),
    documents(range(13)),
    documents(ids=[4, 4, 4, 2, 2, 4, 4, 9, 9, 9, 2, 2]),
    documents(ids=[[0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1], [3] * 12, [0, 0, 1, 1, 0, 0, 2, 2, 2, 2, 0, 0]]),
    blocks(tiles(3, 3), 4),
    blocks(tiles(6, 3), (2, 4)),
    blocks(tiles(4, 12), (3, 1)),
    blocks(TRIANGLE, 1),
    blocks(TRIANGLE[:4, :4], 3),
    blocks(TRIANGLE[:2, :6], (6, 2)),
    blocks(torch.ones(3, 3).bool(), 5),
    blocks(tiles(3, 4, 6), (3, 2)),
    blocks(TRIANGLE.expand(2, S, S), 1),
]

COMPOSED = [
    causal() & window(4),
    causal() & (window(3) | sinks(2)),
    causal() & documents([0, 5, 9, 12]),
    documents([0, 5, 9, 12]) & documents(ids=[[0] * 6 + [1] * 6, [0] * 12]),
    causal() & full() & causal(),
    causal() | causal() | sinks(0),
    full() | causal(),
    prefix(3) & documents([0, 7, 12]),
    ~causal(),
    ~(causal() & window(4)),
    ~~causal(),
    ~full() | sinks(2),
    causal() & ~sinks(1),
    causal() & Chunks(3, 2) & ~Chunks(3, 1),
    causal() & dilated(3) | global_tokens([4]),
    *(star(block, context) for block, context in ((3, 9), (4, 12), (5, 7), (12, 12), (1, 0))),
    causal() & random_blocks(4, 2),
    causal() & (window(2) | global_tokens([0]) | random_blocks(2, 1, seed=5)),
    causal() & blocks(tiles(2, 3, 3), 4) & documents(ids=tiles(3, S).long()),
    blocks(tiles(2, 3, 3), 4) | ~per_head({window(2): 0, sinks(3) & causal(): 1}),
    per_head({causal(): [0, 2], causal() & window(3): [1, 3]}),
    per_head({causal(): [0, 2], prefix(0): 1}),
    per_head({documents(ids=tiles(2, S).long()): [0], causal() | global_tokens([3]): [2, 1]}),
    per_head({blocks(tiles(3, 3, 3), 4): [2, 0], ~per_head({full(): 0, sinks(2): [1, 2]}): [1]}),
]

LINES = [
    Lines((), ()),
    Lines((0, 3, 4), ()),
    Lines((), (0, 1, 5)),
    Lines((2, 9, 11), (0, 2, 3, 7), 3),
    Lines((1,), (0, 6, 40), 4),
    Lines(tuple(range(12)), (1,), 2),
    Lines((5,), tuple(range(12)), 5),
    causal() & Lines((0, 7), (0, 1, 4), 2),
    per_head({Lines((1, 2), (0,)): 0, Lines((), (0, 3), 4) & causal(): [1, 2]}),
]
COMPOSED += LINES

SPANS = [range(a, b) for a in range(S) for b in range(a + 1, S + 1)]
STEPPED = [range(a, last + 1, step) for step in (2, 3, 5) for a in range(S) for last in range(a + step, S, step)]


class Dense:
    """A pattern's whole matrix as bits, and the exact verdict on any tile of it. Planes are heads and batch rows."""

    def __init__(self, pattern: Pattern) -> None:
        planes = pattern.allows(INDEX, INDEX).reshape(-1, S, S)
        powers = 2 ** torch.arange(S)
        self.some = (planes.any(0) * powers).sum(-1).tolist()
        self.all = (planes.all(0) * powers).sum(-1).tolist()

    def verdict(self, q: range, k: range) -> Verdict:
        keys = sum(1 << j for j in k)
        some, every = [self.some[i] & keys for i in q], [self.all[i] & keys for i in q]
        if not any(some):
            return EMPTY
        if all(bits == keys for bits in every):
            return FULL
        if some != every or len(q) != len(k):
            return PARTIAL
        firsts = itertools.accumulate(1 << j for j in k)
        return CAUSAL if all(bits == first for bits, first in zip(some, firsts, strict=True)) else PARTIAL


def wrong_verdicts(pattern: Pattern, spans: list[range], exact: bool) -> Iterator[str]:
    dense = Dense(pattern)
    for q, k in itertools.product(spans, spans):
        said, true = pattern.judge(q, k), dense.verdict(q, k)
        if said is not true and (exact or said is not PARTIAL):
            yield f"{q} x {k}: said {said.name}, is {true.name}"


@pytest.mark.parametrize("pattern", STOCK, ids=str)
def test_judge_of_a_stock_pattern_is_exact_on_unit_steps(pattern):
    assert not list(wrong_verdicts(pattern, SPANS, exact=True))


@pytest.mark.parametrize("pattern", COMPOSED, ids=str)
def test_judge_of_a_composition_is_sound(pattern):
    assert not list(wrong_verdicts(pattern, SPANS, exact=False))


@pytest.mark.parametrize("pattern", STOCK + COMPOSED, ids=str)
def test_judge_is_sound_on_any_steps(pattern):
    assert not list(wrong_verdicts(pattern, STEPPED + SPANS[::7], exact=False))


def wrong_bands(pattern: Pattern, spans: list[range]) -> Iterator[str]:
    for q, k in itertools.product(spans, spans):
        band = pattern.band(q, k)
        if band is None:
            continue
        i, j = torch.tensor(q), torch.tensor(k)
        ahead = j - i[:, None]
        if not bool((((ahead >= band[0]) & (ahead <= band[1])) == pattern.allows(i, j)).all()):
            yield f"{q} x {k}: said {band}"


@pytest.mark.parametrize("pattern", STOCK + COMPOSED, ids=str)
def test_a_band_is_what_is_seen(pattern):
    assert not list(wrong_bands(pattern, SPANS[::5] + STEPPED))


def test_patterns_that_are_bands_say_so():
    q, k = range(40, 90), range(20, 80)
    assert (causal() & window(30)).band(q, k) == band(-29, 0).band(q, k) == (-29, 0)
    assert (causal() & (sinks(4) | window(30))).band(q, k) == (-29, 0) and (causal() & (sinks(4) | window(30))).band(q, range(60)) is None
    assert (sinks(99) | window(30)).band(q, k) == full().band(q, k) == (-FAR, FAR)
    assert list(wrong_bands(causal() | sinks(9), SPANS[::9])) == [] and (~causal()).band(q, k) is None


def test_the_audit_sees_a_causal_judge_that_is_off_by_one():
    class OffByOne(Causal):
        def judge(self, q: range, k: range) -> Verdict:
            return EMPTY if k[0] >= q[-1] else super().judge(q, k)

    class CausalWhenUnequal(Causal):
        def judge(self, q: range, k: range) -> Verdict:
            return CAUSAL if q[0] == k[0] and len(q) > 1 else super().judge(q, k)

    assert list(wrong_verdicts(OffByOne(), SPANS, exact=False))
    assert list(wrong_verdicts(CausalWhenUnequal(), SPANS, exact=False))


UNDER_CAUSAL = [causal() & full(), full() & causal(), causal() & window(99), causal() | sinks(0), strided(8), fixed(8, 1)]


@pytest.mark.parametrize("pattern", UNDER_CAUSAL, ids=str)
def test_a_causal_tile_stays_causal_when_the_rest_allows_all(pattern):
    assert pattern.judge(range(8), range(8)) is CAUSAL


def test_tiles_of_a_striped_layout_are_causal_where_they_align():
    assert causal().judge(range(2, 40, 4), range(1, 40, 4)) is CAUSAL
    assert causal().judge(range(1, 40, 4), range(1, 40, 4)) is CAUSAL
    assert causal().judge(range(1, 40, 4), range(2, 40, 4)) is PARTIAL


def test_tokens_laid_out_by_residue_make_dilated_all_or_nothing():
    assert dilated(4).judge(range(1, 40, 4), range(5, 80, 4)) is FULL
    assert dilated(4).judge(range(1, 40, 4), range(2, 80, 4)) is EMPTY
    assert dilated(6).judge(range(1, 40, 4), range(2, 80, 4)) is EMPTY


@pytest.mark.parametrize("pattern", STOCK + COMPOSED, ids=str)
def test_allows_of_any_indices_is_cut_from_the_whole(pattern):
    i, j = torch.tensor([7, 2, 11]), torch.tensor([5, 5, 0, 9])
    whole, part = pattern.allows(INDEX, INDEX), pattern.allows(i, j)
    assert part.dtype == torch.bool
    assert torch.equal(part, whole[..., i, :][..., j])
    assert pattern.allows(i[:0], j).shape == (*whole.shape[:-2], 0, 4)


@pytest.mark.parametrize("pattern", STOCK + COMPOSED, ids=str)
def test_heads_are_grouped_once_and_each_group_has_one_pattern(pattern):
    dense = pattern.allows(INDEX, INDEX)
    num_heads = dense.shape[-3] if dense.dim() > 2 and dense.shape[-3] > 1 else 3
    groups = pattern.heads(num_heads)
    assert sorted(head for heads, _ in groups for head in heads) == list(range(num_heads))
    assert len({part for _, part in groups}) == len(groups)
    for heads, part in groups:
        alone = part.allows(INDEX, INDEX)
        assert alone.dim() == 2 or alone.shape[-3] == 1
        for head in heads:
            want = dense if dense.dim() == 2 else dense[..., head if dense.shape[-3] > 1 else 0, :, :]
            alone_or_batched = alone.squeeze(-3) if alone.dim() == 4 else alone
            assert torch.equal(alone_or_batched.expand_as(want), want)


@pytest.mark.parametrize("pattern", STOCK + COMPOSED, ids=str)
def test_batch_says_how_many_rows_differ(pattern):
    dense = pattern.allows(INDEX, INDEX)
    assert pattern.batch() == (dense.shape[0] if dense.dim() == 4 else None)


@pytest.mark.parametrize("pattern", STOCK + COMPOSED, ids=str)
def test_a_cut_leaves_something_on_both_sides(pattern):
    for span in SPANS + STEPPED:
        cut = pattern.cut(span)
        assert cut is None or span[0] < cut <= span[-1]


def test_documents_are_cut_at_the_border_nearest_the_middle():
    pattern = documents([0, 2, 5, 9, 12])
    assert pattern.cut(range(12)) == 5
    assert pattern.cut(range(5, 9)) is None
    assert pattern.cut(range(5, 10)) == 9
    assert pattern.cut(range(1, 3)) == 2
    assert pattern.cut(range(2, 9)) == 5
    assert (causal() & pattern | sinks(1)).cut(range(12)) == (~pattern).cut(range(12)) == 5
    assert per_head({causal(): 0, pattern: 1}).cut(range(12)) == 5
    assert documents(ids=[[0] * 6 + [1] * 6, [0] * 2 + [1] * 10]).cut(range(12)) == 6
    for span in SPANS:
        borders = [border for border in (2, 5, 9) if span[0] < border <= span[-1]]
        nearest = min(borders, key=lambda border: (abs(2 * border - span.start - span.stop), border), default=None)
        assert pattern.cut(span) == nearest


def test_blocks_are_cut_at_a_tile_edge():
    assert blocks(tiles(3, 3), 4).cut(range(12)) == 4
    assert blocks(tiles(3, 3), 4).cut(range(3, 12)) == 8
    assert blocks(tiles(3, 3), 4).cut(range(4, 8)) is None


@pytest.mark.parametrize(
    ("pattern", "keys"),
    [
        (causal() & dilated(3), {2, 5, 8, 11}),  # atrous(3), methods 4.1
        (causal() & window(4), {8, 9, 10, 11}),  # local(3)
        (causal() & (window(4) | dilated(3)), {2, 5, 8, 9, 10, 11}),  # sparse(3)
        (strided(3), {2, 5, 8, 9, 10, 11}),
        (strided(4), {3, 7, 8, 9, 10, 11}),  # Sparse Transformer, l = 4
        (fixed(4, 1), {3, 7, 8, 9, 10, 11}),
        (fixed(4, 2), {2, 3, 6, 7, 8, 9, 10, 11}),
        (causal() & (window(4) | sinks(2)), {0, 1, 8, 9, 10, 11}),  # StreamingLLM
        (causal() & global_tokens([2, 5]), {2, 5}),
        (prefix(3), set(range(12))),
        (documents([0, 9, 12]), {9, 10, 11}),
        (star(4, 12), {0, 1, 2, 3, 8, 9, 10, 11}),
        (star(4, 11), set(range(12))),
        (causal() & own_block(5), {10, 11}),
    ],
    ids=str,
)
def test_query_11_sees_what_the_papers_say(pattern, keys):
    seen = pattern.allows(torch.tensor([11]), INDEX)[0]
    assert set(seen.nonzero().flatten().tolist()) == keys


def test_random_blocks_are_those_of_the_seed_at_or_before_the_query():
    drawn = random_blocks(3, 2, seed=4)
    assert drawn == random_blocks(3, 2, seed=4) != random_blocks(3, 2, seed=5)
    seen = drawn.allows(INDEX, INDEX)[::3, ::3]
    assert seen.sum(1).tolist() == [1, 2, 2, 2] and not seen.triu(1).any()


def test_windows_and_prefixes_look_ahead_unless_made_causal():
    assert window(2).allows(torch.tensor([3]), INDEX)[0].tolist() == [False] * 2 + [True] * 10
    assert prefix(5).allows(torch.tensor([1]), INDEX)[0].tolist() == [True] * 5 + [False] * 7


def test_strided_and_fixed_are_the_papers_definitions():
    i, j = INDEX[:, None], INDEX
    for l in range(1, S + 2):
        assert torch.equal(strided(l).allows(INDEX, INDEX), (j <= i) & ((i - j < l) | ((i - j) % l == 0)))
        for c in range(1, l + 1):
            assert torch.equal(fixed(l, c).allows(INDEX, INDEX), (j <= i) & ((i // l == j // l) | (j % l >= l - c)))


def test_patterns_compare_and_hash_by_content():
    pairs = [
        (window(4), window(4), window(5)),
        (causal() & window(4), causal() & window(4), window(4) & causal()),
        (window(4) & causal(), window(4) & causal(), window(4) | causal()),
        (documents([0, 2, 4]), documents(ids=[7, 7, 3, 3]), documents([0, 2, 5])),
        (documents([0, 2, 4]), documents(cu_seqlens=torch.tensor([0, 2, 2, 4], dtype=torch.int32)), documents([0, 3, 4])),
        (documents(torch.tensor([[5, 5, 8]])), documents(ids=[1, 1, 0]), documents(ids=[[1, 1, 0], [1, 1, 0]])),
        (blocks([[True, False]], 4), blocks(torch.tensor([[[True, False]]]), (4, 4)), blocks([[True, False]], (4, 2))),
        (blocks([[True, False]], 4), blocks([[True, False]], 4), blocks([[True, False, False]], 4)),
        (global_tokens([3, 1]), global_tokens({1, 3}), global_tokens([1])),
        (global_tokens(torch.tensor([1, 3])), global_tokens([1, 3, 3]), global_tokens(3)),
        (
            per_head({causal(): [2, 0], full(): 1}),
            per_head({full(): [1], causal(): range(0, 3, 2)}),
            per_head({causal(): [0, 1], full(): 2}),
        ),
    ]
    for one, same, other in pairs:
        assert one == same and hash(one) == hash(same) and repr(one) == repr(same)
        assert one != other and repr(one) != repr(other)
    assert causal() != full() and sinks(3) != prefix(3)


@pytest.mark.parametrize("pattern", STOCK + COMPOSED, ids=str)
def test_a_pattern_survives_use_and_pickling(pattern):
    before = repr(pattern), hash(pattern)
    pattern.allows(INDEX, INDEX)
    copy = pickle.loads(pickle.dumps(pattern))
    assert copy == pattern and (repr(copy), hash(copy)) == before
    assert "tensor" not in before[0] and " at 0x" not in before[0]


def test_a_pattern_prints_as_it_is_written():
    assert str(causal() & (window(8) | sinks(4))) == "causal & (window(8) | sinks(4))"
    assert str(causal() & window(8) | sinks(4)) == "(causal & window(8)) | sinks(4)"
    assert str(~(causal() & ~full())) == "~(causal & ~full)"
    assert str(documents([0, 5, 9])) == "documents(0 5 9)"
    assert str(documents(range(100))) == "documents(0 1 2 ... 98 99 (100 in all))"
    assert str(blocks(tiles(2, 3, 4), (8, 16))) == "blocks(2 heads, 3 x 4 tiles of 8 x 16)"
    assert str(per_head({causal(): [0, 2], fixed(8, 2): 1})) == "per_head(causal: 0 2, fixed(8, 2): 1)"


def test_documents_of_a_batch_hide_each_rows_own():
    ids = torch.tensor([[0, 0, 1, 1], [5, 6, 6, 5]])
    pattern = documents(ids)
    index = torch.arange(4)
    assert torch.equal(pattern.allows(index, index), (ids[:, :, None] == ids[:, None])[:, None])
    assert (causal() & pattern & blocks(tiles(3, 2, 2), 2)).allows(index, index).shape == (2, 3, 4, 4)
    assert pattern.judge(range(1), range(2, 3)) is EMPTY
    assert pattern.judge(range(1), range(3, 4)) is PARTIAL


def test_documents_with_many_borders_are_judged_and_hashed_once():
    pattern = documents(torch.arange(0, 1_000_001, 10))
    assert pattern.judge(range(500_000), range(500_000, 1_000_000)) is EMPTY
    assert pattern.judge(range(500_000, 500_010), range(500_000, 500_010)) is FULL
    assert hash(pattern) == pattern.__dict__["_hash"]


def test_blocks_with_rows_of_many_bits_print_their_content():
    wide = torch.zeros(1, 20_000, dtype=torch.bool)
    wide[0, -1] = True
    assert repr(blocks(wide, 16)) == f"Blocks(masks=8{'0' * 4999}, columns=20000, size=(16, 16))"
