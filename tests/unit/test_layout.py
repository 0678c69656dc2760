"""Layouts: every token on exactly one rank, whatever the length, and sizes as equal as chunks allow."""

import pytest
import torch

from ringctx import Attention, Layout, LayoutError
from ringctx.core import balance
from ringctx.core.layout import count, join, ranges_of, take
from ringctx.patterns import causal, documents, window

MAKERS = {
    "contiguous": Layout.contiguous,
    "zigzag": Layout.zigzag,
    "striped": Layout.striped,
    "residue": lambda length, size: Layout.residue(length, size, 3),
    "documents": lambda length, size: Layout.documents(sorted({0, length // 3, length // 2, length}), size),
    "balanced": lambda length, size: Layout.balanced(length, size, Attention(causal() & window(5))),
}


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("length", [1, 2, 7, 16, 33, 1001, 1002])
@pytest.mark.parametrize("name", MAKERS)
def test_every_token_lives_on_exactly_one_rank(name, length, size):
    layout = MAKERS[name](length, size)
    everything = torch.cat([layout.indices(r) for r in range(size)])
    assert layout.size == size
    assert layout.length == length
    assert torch.equal(everything.sort().values, torch.arange(length))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("length", [0, 1, 7, 1001, 1002])
@pytest.mark.parametrize("name", ["contiguous", "zigzag", "striped", "residue"])
def test_sizes_are_equal_up_to_chunk_rounding(name, length, size):
    counts = [MAKERS[name](length, size).count(r) for r in range(size)]
    assert max(counts) - min(counts) <= 2


def test_packed_documents_do_not_pile_their_left_overs_on_one_rank():
    lengths = [1, 5, 2, 9, 3, 1, 1, 7] * 40
    layout = Layout.documents([0, *torch.tensor(lengths).cumsum(0).tolist()], 4)
    counts = [layout.count(r) for r in range(4)]
    assert max(counts) - min(counts) <= 2


def test_the_drawings_in_the_docstrings_are_right():
    rows = lambda layout: [layout.indices(r).tolist() for r in range(layout.size)]
    assert rows(Layout.contiguous(8, 2)) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert rows(Layout.contiguous(8, 2, block=3)) == [[0, 1, 2], [3, 4, 5, 6, 7]]
    assert rows(Layout.residue(6, 2, 4)) == [[0, 4, 1, 5], [2, 3]]
    assert rows(Layout.zigzag(8, 2).newest(3)) == [[5, 6, 7], []]
    with pytest.raises(LayoutError, match="blocks of at least one token; got 0"):
        Layout.contiguous(8, 2, block=0)
    assert rows(Layout.zigzag(8, 2)) == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert rows(Layout.striped(8, 2)) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert rows(Layout.residue(8, 2, 4)) == [[0, 4, 1, 5], [2, 6, 3, 7]]


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("dim", [1, 2])
def test_unshard_undoes_shard(name, dim):
    layout = MAKERS[name](33, 4)
    shape = [2, 3, 4, 5]
    shape[dim] = 33
    x = torch.randn(shape)
    assert torch.equal(layout.unshard([layout.shard(x, r, dim) for r in range(4)], dim), x)


def test_the_owner_is_the_rank_that_has_the_index():
    layout = Layout.zigzag(33, 4)
    for rank in range(4):
        assert {layout.owner(int(i)) for i in layout.indices(rank)} <= {rank}


def test_layouts_compare_and_hash_by_content():
    assert Layout.zigzag(33, 4) == Layout.zigzag(33, 4)
    assert hash(Layout.zigzag(33, 4)) == hash(Layout.zigzag(33, 4))
    assert Layout.zigzag(33, 4) != Layout.contiguous(33, 4)
    assert Layout(((range(2), range(2, 5)), ())) == Layout(((range(5),), ()))


def test_gaps_are_allowed_but_cannot_be_unsharded():
    layout = Layout(((range(4),), (range(10, 12),)))
    assert layout.length == 12
    with pytest.raises(LayoutError, match="gaps"):
        layout.unshard([torch.zeros(1, 4), torch.zeros(1, 2)])


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Layout(()), "at least one rank"),
        (lambda: Layout(((range(4),), (range(3, 6),))), "share an index"),
        (lambda: Layout(((range(0, 9, 2),), (range(1, 9, 3),))), "share an index"),
        (lambda: Layout(((range(-1, 4),),)), "begin at 0"),
        (lambda: Layout.zigzag(8, 0), "at least one rank"),
        (lambda: Layout.contiguous(-1, 2), "no negative length"),
        (lambda: Layout.residue(8, 2, 0), "dilation of at least 1"),
        (lambda: Layout.documents([1, 5], 2), "begin with 0"),
        (lambda: Layout.documents([0, 5, 5], 2), "ascend"),
        (lambda: Layout.zigzag(8, 2).shard(torch.zeros(1, 7), 0), "of 8 tokens, but dim 1 of the tensor has 7"),
        (lambda: Layout.zigzag(8, 2).unshard([torch.zeros(1, 4)]), "2 ranks, but 1 shards"),
        (lambda: Layout.zigzag(8, 2).owner(8), "No rank owns index 8"),
    ],
)
def test_a_layout_that_cannot_be_says_why(make, sentence):
    with pytest.raises(LayoutError, match=sentence):
        make()


def test_ranges_join_where_they_continue_each_other():
    assert join([range(3), range(3, 3), range(3, 5), range(8, 9)]) == (range(5), range(8, 9))
    assert join([range(0, 5, 2), range(5, 6)]) == (range(0, 5, 2), range(5, 6))


def test_ranges_of_indices_and_back():
    for indices in ([], [4], [4, 5], [1, 3, 5], [0, 1, 2, 7, 8, 20]):
        ranges = ranges_of(torch.tensor(indices, dtype=torch.int64))
        assert [i for r in ranges for i in r] == indices
        assert count(ranges) == len(indices)


def test_take_gives_the_tokens_at_local_positions():
    ranges = (range(4), range(10, 20, 2))
    assert [i for r in take(ranges, [(1, 3), (3, 6), (8, 9)]) for i in r] == [1, 2, 3, 10, 12, 18]


def test_a_balanced_layout_loads_all_ranks_alike():
    from ringctx.core.tiles import area, tiles

    pattern = causal() & documents((0, 300, 400, 2048))
    loads = {}
    for name, layout in {"balanced": Layout.balanced(2048, 4, Attention(pattern)), "contiguous": Layout.contiguous(2048, 4)}.items():
        work = [sum(area(tiles(pattern, layout.spans[p], layout.spans[o])) for o in range(4)) for p in range(4)]
        loads[name] = max(work) * 4 / sum(work)
    assert loads["balanced"] < 1.15 < loads["contiguous"]


def test_blocks_are_exchanged_until_that_helps_no_more():
    cost = {0: 9, 1: 8, 2: 1, 3: 1, 4: 6, 5: 2}
    owned = [[range(1), range(1, 2)], [range(2, 3), range(3, 4)], [range(4, 5), range(5, 6)]]
    load = [sum(cost[b.start] for b in blocks) for blocks in owned]
    steps = 0
    while balance._exchange(owned, load, cost):
        steps += 1
        assert load == [sum(cost[b.start] for b in blocks) for blocks in owned]
    assert steps and max(load) == 10 and sorted(b.start for blocks in owned for b in blocks) == list(range(6))
