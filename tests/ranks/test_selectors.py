"""Selectors on ranks: the keys of the definition, on every number of ranks and every layout, and attention under that mask."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from ringctx import Attention, Layout, RanksDisagree, decode_attention, ring_attention
from ringctx.core.select import Sight
from ringctx.errors import Unsupported
from ringctx.huggingface.context import Watched
from ringctx.methods.rotary import Rotary
from ringctx.methods.selectors import AShape, FlexPrefill, Moba, Quest, Representatives, Sparge, VerticalSlash, XAttention
from ringctx.patterns import blocks, causal, full
from ringctx.testing import dense, error
from tests.pool import Pool
from tests.selection import keeps

SELECTORS = [
    VerticalSlash(6, 8, 8, 2, 4, 1),
    VerticalSlash(5, 7, 70, 0, 0, 4),
    AShape(3, 9),
    FlexPrefill(0.6, 0.1, 8, 8),
    FlexPrefill(0.5, 9.0, 7, 5),
    XAttention(0.8, 4, 8),
    XAttention(0.5, 1, 5),
    Sparge(0.02, 0.4, 16, 8),
    Sparge(0.05, 0.4, 6, 10, smooth=True),
    Quest(3, 8),
    Representatives(2, 6, 2, 5, 3, 4),
    Moba(3, 8),
]
LAYOUTS = ["contiguous", "zigzag", "striped"]
ENCODING = Rotary((1.0, 0.3, 0.1, 0.02))


def inputs(n: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """q (1 n 4 8), k and v (1 n 2 8): GQA, and large enough that attention is far from even."""
    random = torch.Generator().manual_seed(n)
    q, k, v = (torch.randn(1, n, heads, 8, generator=random).to(dtype) for heads in (4, 2, 2))
    return 2 * q, k, v


def _chosen(watched: Watched, n: int, first: int) -> Tensor:
    """(4, t, n): what was chosen, dense where nothing was."""
    pattern = causal() if watched.chosen is None else causal() & watched.chosen
    return pattern.allows(torch.arange(first, n), torch.arange(n)).expand(4, -1, -1)


def _prefill(ring: Any, n: int, cut: int, seed: int | None = None) -> list[tuple[Tensor, Tensor]]:
    """For each layout and selector what was chosen for the queries from `cut` on, and their attention."""
    q, k, v = inputs(n)
    results = []
    for kind in LAYOUTS:
        layout, keys = getattr(Layout, kind)(n - cut, ring.size).shifted(cut), getattr(Layout, kind)(cut, ring.size)
        keys = Layout(tuple(a + b for a, b in zip(keys.spans, layout.spans, strict=True)))
        for selector in SELECTORS:
            watched = Watched(selector)
            attention = Attention(pattern=causal(), encoding=ENCODING, select=watched)
            mine, theirs = layout.indices(ring.rank), keys.indices(ring.rank)
            out = ring_attention(q[:, mine], k[:, theirs], v[:, theirs], ring=ring, layout=layout, key_layout=keys, attention=attention)
            results.append((_chosen(watched, n, cut), mine, out))
    return results


@cache
def wanted(selector: Any, n: int, first: int, dense_if: bool) -> tuple[Tensor, Tensor]:
    """What the definition sees (4, t, n) of queries from `first` on, or all before a query; and the oracle's output under it."""
    q, k, v = inputs(n)
    turned = ENCODING.queries(q[:, first:], torch.arange(first, n))[0], ENCODING.keys(k, torch.arange(n))[0]
    before = torch.ones(4, n, n).tril()[:, first:].bool()
    seen = before if dense_if else keeps(selector, *turned)
    if n == 61 and first < 60 and not dense_if:
        assert seen.sum() < 0.9 * before.sum(), f"{selector} would select nearly all of this input"
    whole = torch.zeros(4, n, n, dtype=torch.bool)
    whole[:, first:] = seen
    return seen, dense(Attention(pattern=blocks(whole, 1), encoding=ENCODING), q, k, v).out[:, first:]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize(("n", "cut"), [(61, 0), (61, 27), (3, 0)])
def test_ranks_select_what_the_definition_says_and_attend_to_it(pool: Pool, size: int, n: int, cut: int) -> None:
    everyone = pool.run(_prefill, n, cut, size=size)
    for number, selector in enumerate(SELECTORS * len(LAYOUTS)):
        want, answer = wanted(selector, n, cut, not selector.prefill)
        out = torch.zeros(1, n, 4, 8)
        for chosen, mine, part in (results[number] for results in everyone):
            assert torch.equal(chosen, want), f"{selector} in {LAYOUTS[number // len(SELECTORS)]}"
            out[:, mine] = part
        assert error(out[:, cut:], answer) < 5e-6, selector


def _decode(ring: Any, n: int, new: int) -> list[tuple[Tensor, Tensor]]:
    q, k, v = inputs(n)
    results = []
    for kind in LAYOUTS:
        keys = getattr(Layout, kind)(n, ring.size)
        mine = keys.indices(ring.rank)
        for selector in SELECTORS:
            watched = Watched(selector)
            attention = Attention(pattern=causal(), encoding=ENCODING, select=watched)
            out = decode_attention(q[:, n - new :], k[:, mine], v[:, mine], key_layout=keys, ring=ring, attention=attention)
            results.append((_chosen(watched, n, n - new), out))
    return results


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize(("n", "new"), [(61, 1), (64, 3), (2, 2)])
def test_decoding_ranks_select_what_the_definition_says(pool: Pool, size: int, n: int, new: int) -> None:
    everyone = pool.run(_decode, n, new, size=size)
    for number, selector in enumerate(SELECTORS * len(LAYOUTS)):
        want, answer = wanted(selector, n, n - new, not selector.decode)
        for chosen, out in (results[number] for results in everyone):
            assert torch.equal(chosen, want), selector
            assert error(out, answer) < 5e-6, selector


def _refusals(ring: Any) -> list[str]:
    layout = Layout.contiguous(12, ring.size)
    q, k, v = (layout.shard(x, ring.rank) for x in inputs(12))
    calls = [
        (q.clone().requires_grad_(), k, v, Attention(select=XAttention(0.9, 4, 8))),
        (*(x.expand(2, -1, -1, -1) for x in (q, k, v)), Attention(select=Moba(2, 4))),
        (q, k, v, Attention(pattern=full(), select=Moba(2, 4))),
        (q, k, v, Attention(select=Moba(2, 4 + ring.rank))),
    ]
    said = []
    for *tensors, attention in calls:
        try:
            ring_attention(*tensors, ring=ring, layout=layout, attention=attention)
            said.append("computed")
        except (Unsupported, RanksDisagree) as refusal:
            said.append(str(refusal))
    return said


def test_what_cannot_be_selected_is_refused_before_anything_moves(pool: Pool) -> None:
    first, second = pool.run(_refusals, size=2)
    assert first == second
    training, batch, ahead, differ = first
    assert training.startswith("XAttention selects for inference and has no backward; call it under torch.no_grad()")
    assert batch.startswith("Moba selects for one sequence, and q has a batch of 2")
    assert ahead.startswith("Moba selects among the keys before a query, and full looks ahead")
    assert "attention is" in differ and "select Moba" in differ


def _traffic(ring: Any, n: int) -> tuple[int, int, int]:
    """Bytes sent of summaries and of keys with a selection, and of keys without one."""
    layout = Layout.contiguous(n, ring.size)
    q, k, v = (layout.shard(x, ring.rank) for x in inputs(n))
    select = Representatives(1, 16, 2, recent=5, initial=4, local=8)
    ring.traffic.reset()
    ring_attention(q, k, v, ring=ring, layout=layout, attention=Attention(select=select), transport="fetch")
    with_selection = ring.traffic.sent["selection"], ring.traffic.sent["keys"]
    ring.traffic.reset()
    ring_attention(q, k, v, ring=ring, layout=layout, transport="fetch")
    return (*with_selection, ring.traffic.sent["keys"])


def test_keys_that_no_rank_selects_are_not_sent_and_summaries_are_counted_apart(pool: Pool) -> None:
    sent = pool.run(_traffic, 512, size=4)
    summaries, some, every = (sum(column) for column in zip(*sent, strict=True))
    relevance, queries = 4 * (512 // 16) * 2 * 8, 5 * 4 * 8 * 4  # float64 of 2 keys a head and block; 5 queries of 4 heads in float32
    assert summaries == 3 * (4 * relevance + queries)
    assert 0 < some < every / 2


def _ties(ring: Any, dtype: torch.dtype) -> list[Tensor]:
    """Keys that are all alike: every score is a tie."""
    n, results = 40, []
    for kind in LAYOUTS:
        layout = getattr(Layout, kind)(n, ring.size)
        q, k = inputs(n, dtype)[0], torch.full((1, n, 2, 8), 0.1, dtype=dtype)
        sight = Sight(ring, layout, layout, 8**-0.5)
        for selector in [s for s in SELECTORS if s.prefill]:
            mine = layout.indices(ring.rank)
            results.append(selector.select(q[0, mine], k[0, mine], sight).allows(torch.arange(n), torch.arange(n)).expand(4, -1, -1))
    return results


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_ties_fall_to_the_lower_index_on_every_number_of_ranks(pool: Pool, dtype: torch.dtype) -> None:
    alone = pool.run(_ties, dtype, size=1)[0]
    for size in (2, 3, 4):
        for results in pool.run(_ties, dtype, size=size):
            for number, (one, other) in enumerate(zip(alone, results, strict=True)):
                assert torch.equal(one, other), f"result {number} on {size} ranks"
