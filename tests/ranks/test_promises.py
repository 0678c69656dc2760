"""Every promise of the core once, on a few dozen tokens: a dense set that runs in seconds and notices what `make mutants` breaks.

Ranks are virtual here (`tests.virtual`), but for the last tests, which hold the same cases over gloo.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ringctx import Attention, Layout, RankLost, RanksDisagree, decode_attention, ring_attention
from ringctx import patterns as p
from ringctx.core.compute import head_groups
from ringctx.core.plan import Plan, World, make_plan
from ringctx.core.ring import Message, Pending, Ring
from ringctx.methods.rotary import Rotary
from ringctx.testing import dense, error
from tests import virtual
from tests.cases import PATTERNS, TOLERANCE, Case, compare, make_layout, on_rank, oracle, problem, small_tiles
from tests.pool import Fold, Pool


@pytest.fixture(autouse=True, scope="module")
def few_tokens_make_many_tiles() -> Iterator[None]:
    with small_tiles():
        yield


def case(size: int, length: int, layout: str, pattern: str, route: str, **more: Any) -> Case:
    """A case in fp64 with four query heads on two key heads."""
    return Case(**{"heads": (4, 2), "widths": (8, 8), **more}, size=size, length=length, layout=layout, pattern=pattern, route=route)


EXACT = {
    # one rank: tiles, merges, scores
    "merge": case(1, 33, "residue", "causal", "rotate", lse=True),
    "dead_rows": case(1, 40, "residue", "causal&~sinks2", "rotate"),
    "islands": case(1, 120, "contiguous", "blocks", "rotate"),
    "scores": case(1, 40, "residue", "causal&(window40|sinks4)", "rotate", scores="all", lse=True),
    "widths": case(1, 33, "contiguous", "causal", "rotate", widths=(8, 12)),
    "shared_keys": case(1, 33, "contiguous", "causal", "rotate", heads=(8, 2)),
    # keys travel
    "rotate": case(3, 42, "contiguous", "full", "rotate", lse=True),
    "uneven": case(3, 41, "zigzag", "causal", "rotate", batch=2),
    "window": case(3, 42, "contiguous", "causal&window9", "rotate"),
    "spans": case(4, 64, "contiguous", "longformer", "fetch"),
    "gaps": case(3, 66, "zigzag", "causal&(window40|sinks4)", "fetch", keys="gaps"),
    "documents": case(4, 57, "documents", "causal&documents", "fetch"),
    "gather": case(3, 41, "striped", "causal", "gather"),
    "double": case(4, 44, "zigzag", "longformer", "double"),
    "chunk": case(2, 20, "zigzag", "causal", "rotate", keys="chunk", scores="rotary"),
    "chunk_rotary": case(2, 20, "contiguous", "causal", "fetch", keys="moved", scores="rotary"),
    "cross": case(2, 33, "zigzag", "full", "fetch", keys="cross"),
    "one_rank": case(2, 40, "zigzag", "causal", "fetch", keys="one_rank"),
    "few": case(4, 3, "contiguous", "causal", "rotate"),
    # heads and queries travel
    "heads": case(4, 42, "zigzag", "causal", "heads", lse=True),
    "heads_uneven": case(4, 33, "zigzag", "per_head", "heads", heads=(6, 3)),
    "heads_scores": case(2, 33, "striped", "causal", "heads", scores="all", lse=True),
    "usp": case(4, 44, "zigzag", "causal&window9", "usp", scores="sink"),
    "pass_q": case(3, 42, "contiguous", "causal&window9", "pass_q", lse=True),
    "pass_q_heads": case(3, 42, "striped", "per_head", "pass_q"),
    # what is told apart by index and head
    "per_head": case(3, 42, "zigzag", "per_head", "rotate"),
    "ids": case(3, 42, "zigzag", "causal&ids", "fetch", batch=2),
    "rotary": case(3, 41, "zigzag", "causal", "rotate", scores="rotary"),
    "alibi": case(3, 41, "zigzag", "full", "fetch", scores="alibi", lse=True),
    "distance": case(3, 41, "zigzag", "causal", "rotate", scores="distance"),
    "pair": case(2, 33, "striped", "causal", "fetch", scores="pair"),
    "sink": case(3, 41, "zigzag", "causal&window9", "rotate", scores="sink", lse=True),
    "dropout": case(3, 41, "zigzag", "causal", "rotate", scores="dropout", batch=2),
    "scale": case(2, 33, "zigzag", "causal", "fetch", scores="scale"),
}


def wrong(case: Case, ranks: list[dict[str, Tensor]]) -> dict[str, float]:
    """What misses the tolerance."""
    given = problem(case)
    found = compare(given, oracle(case, given), ranks)
    return {name: value for name, value in found.items() if not value <= TOLERANCE[case.dtype]}


@pytest.mark.parametrize("name", EXACT)
def test_forward_and_backward_are_the_definition(name: str) -> None:
    asked = EXACT[name]
    assert not wrong(asked, virtual.run(on_rank, asked, size=asked.size, fold=asked.fold))


# -- plans --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport, nodes", [("rotate", 1), ("rotate", 2), ("fetch", 1), ("gather", 1)])
@pytest.mark.parametrize("pattern", ["causal", "causal&window9", "causal&(window40|sinks4)", "documents", "blocks", "longformer"])
def test_plans_fit_together_and_cover_every_pair_once(pattern: str, transport: str, nodes: int) -> None:
    for layout in (make_layout(kind, 70, 4) for kind in ("contiguous", "zigzag", "residue")):
        world = World((PATTERNS[pattern](70, 2, 1),), layout, layout, nodes)
        plans = [make_plan(world.patterns, layout, layout, rank, transport, nodes) for rank in range(4)]
        _messages_meet(plans)
        for plan in plans:
            _covers(plan, world)


def _messages_meet(plans: list[Plan]) -> None:
    """What one rank sends at a hop, another receives at that hop; gradients likewise."""
    sent, received = Counter[Any](), Counter[Any]()
    for plan in plans:
        for number, hop in enumerate(plan.hops):
            sent.update((number, plan.rank, x.peer, x.owner, x.spans) for x in hop.send)
            received.update((number, x.peer, plan.rank, x.owner, x.spans) for x in hop.receive)
            sent.update(("dk", number, plan.rank, x.grads_to, x.owner, x.spans) for x in hop.visits)
            received.update(("dk", number, x.peer, plan.rank, x.owner, x.spans) for x in hop.grads_receive)
    assert sent == received


def _covers(plan: Plan, world: World) -> None:
    """Tiles compute exactly what the pattern allows: each pair once, and none that it hides."""
    i = world.layout.indices(plan.rank)
    allowed = world.patterns[0].allows(i, torch.arange(world.layout.length))
    computed = torch.zeros_like(allowed, dtype=torch.int)
    for visit in (plan.home, *(v for hop in plan.hops for v in hop.visits)):
        own = world.layout.indices(visit.owner)
        j = torch.cat([own[a:b] for a, b in visit.spans]) if visit.spans else own[:0]
        for verdict, a, b, c, d in visit.tiles[0]:
            seen = world.patterns[0].allows(i[a:b], j[c:d])
            tile = {1: torch.ones_like(seen), 2: torch.ones_like(seen).tril(), 3: seen}[verdict]
            rows = torch.arange(a, b)[:, None]
            computed[rows, j[c:d]] += tile.int()
    assert torch.equal(computed, allowed.int())


def test_layouts_are_those_of_their_documentation() -> None:
    zigzag, striped, residue = Layout.zigzag(8, 2), Layout.striped(8, 2), Layout.residue(8, 2, 4)
    assert [zigzag.indices(r).tolist() for r in range(2)] == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert [striped.indices(r).tolist() for r in range(2)] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert [residue.indices(r).tolist() for r in range(2)] == [[0, 4, 1, 5], [2, 6, 3, 7]]
    x = torch.arange(41)[None]
    for kind in ("contiguous", "zigzag", "striped", "residue", "documents"):
        layout = make_layout(kind, 41, 3)
        assert torch.equal(layout.unshard([layout.shard(x, r) for r in range(3)]), x)


# -- traffic and memory -------------------------------------------------------------------------------------------------


def _measured(ring: Any, asked: Case) -> dict[str, Any]:
    """Keys received by this rank, and the most bytes of keys and gradients that it held at once."""
    on_rank(ring, asked)
    world = ring.world
    return {"received": world.received[ring.rank]["keys"], "most": dict(world.most[ring.rank]), "told": dict(ring.traffic.received)}


@pytest.mark.parametrize("pattern", ["causal", "causal&window9", "causal&(window40|sinks4)", "blocks"])
def test_fetch_brings_the_keys_that_are_needed_and_no_others(pattern: str) -> None:
    asked = case(3, 66, "zigzag", pattern, "fetch")
    given = problem(asked)
    allowed = given.attention.pattern.allows(given.i, given.j)
    for rank, found in enumerate(virtual.run(_measured, asked, size=3)):
        mine = given.layout.indices(rank)
        needed = allowed[mine].any(0).index_fill(0, mine, False)
        assert found["received"] == 2 * int(needed.sum()) * 2 * 16 * 8  # forward and backward; heads, widths, fp64
        assert found["told"].get("keys", 0) == found["received"]


def test_rotate_carries_what_later_ranks_need_as_far_as_it_is_needed() -> None:
    asked = case(4, 64, "contiguous", "causal&window9", "rotate")
    received = [found["received"] for found in virtual.run(_measured, asked, size=4)]
    assert received == [0] + 3 * [2 * 8 * 2 * 16 * 8]  # the 8 keys before each shard, from the left neighbour alone


@pytest.mark.parametrize("route", ["rotate", "fetch", "double"])
def test_two_visiting_blocks_at_most_are_here(route: str) -> None:
    asked = case(4, 64, "contiguous", "full", route)
    block = 16 * 2 * 16 * 8
    for found in virtual.run(_measured, asked, size=4, fold=asked.fold):
        assert 0 < found["most"]["keys"] <= 2 * block
        assert 0 < found["most"]["grads"] <= 2 * block


def test_one_token_alone_has_no_gradient() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 1, 4, 64, requires_grad=True) for _ in range(3))
    out = ring_attention(q, k, v, ring=Ring.alone(), layout=Layout.contiguous(1, 1), attention=Attention())
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
    assert not dq.any() and not dk.any() and dv.all()


# -- half precision -----------------------------------------------------------------------------------------------------


def test_bf16_sums_are_kept_and_travel_in_fp32() -> None:
    """The reference kernel answers in fp32, so what is left is the rounding of the inputs' own dtype, once."""
    asked = case(4, 512, "contiguous", "full", "rotate", dtype="bf16", widths=(16, 16))
    given = problem(asked)
    found = virtual.run(_in_reference, asked, size=4)
    assert all(x["lse"].dtype == torch.float32 and x["travels"] == {torch.float32} for x in found)
    errors = compare(given, oracle(asked, given), [{**x, "dparams": []} for x in found])
    assert errors["lse"] < 1e-6
    assert all(errors[name] < 2.2e-3 for name in ("out", "dq", "dk", "dv"))  # 1.7e-3; sums in bf16 give 2.7e-3 and more


def _in_reference(ring: Any, asked: Case) -> dict[str, Any]:
    given = problem(asked)
    q, k, v = (given.part(x, ring.rank, given.layout, given.i).requires_grad_() for x in (given.q, given.k, given.v))
    fixed: dict[str, Any] = {"layout": given.layout, "attention": given.attention, "transport": "rotate", "kernel": "reference"}
    out, lse = ring_attention(q, k, v, ring=ring, return_lse=True, **fixed)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), given.part(given.dout, ring.rank, given.layout, given.i))
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv, "travels": ring.world.dtypes["grads"]}


# -- decode -------------------------------------------------------------------------------------------------------------

DECODE = {
    "causal": Attention(),
    "window": Attention(pattern=p.causal() & p.window(9)),
    "rotary": Attention(encoding=Rotary((0.5, 0.25))),
    "sink": Attention(sink=torch.tensor([0.3, -1.0, 0.5, 2.0], dtype=torch.float64)),
}


def _decoded(ring: Any, name: str, num_new: int) -> Tensor:
    layout = Layout(((range(9), range(20, 23)), (range(9, 20),), ()))
    draw = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, n, h, 8, dtype=torch.float64, generator=draw) for n, h in ((num_new, 4), (23, 2), (23, 2)))
    if ring is None:
        return dense(DECODE[name], q, k, v, i=torch.arange(23 - num_new, 23)).out
    return decode_attention(q, layout.shard(k, ring.rank), layout.shard(v, ring.rank), key_layout=layout, ring=ring, attention=DECODE[name])


@pytest.mark.parametrize("num_new", [1, 3])
@pytest.mark.parametrize("name", DECODE)
def test_decode_is_the_definition_and_equal_on_every_rank(name: str, num_new: int) -> None:
    outs = virtual.run(_decoded, name, num_new, size=3)
    assert all(torch.equal(out, outs[0]) for out in outs)
    assert error(outs[0], _decoded(None, name, num_new)) < 1e-12


# -- ranks that disagree, ranks that are gone ---------------------------------------------------------------------------

ODD: dict[str, dict[str, Any]] = {
    "dtype": {"dtype": torch.float32},
    "layout": {"layout": Layout.striped(12, 3)},
    "attention": {"attention": Attention(pattern=p.causal() & p.window(1), scale=0.1)},
    "seed": {"seed": 7},
}


def _differs(ring: Any, name: str) -> str:
    """A call in which no token needs another, so that nothing but the header is exchanged; rank 1 calls otherwise."""
    own = {"dtype": torch.float64, "layout": Layout.zigzag(12, 3), "attention": Attention(pattern=p.causal() & p.window(1)), "seed": 0}
    asked = {**own, **(ODD[name] if ring.rank == 1 else {})}
    x = torch.ones(1, 4, 2, 8, dtype=asked.pop("dtype"))
    with pytest.raises(RanksDisagree) as caught:
        ring_attention(x, x, x, ring=ring, transport="fetch", **asked)
    return str(caught.value)


@pytest.mark.parametrize("name", ODD)
def test_a_rank_that_differs_is_a_sentence_on_every_rank(name: str) -> None:
    said = virtual.run(_differs, name, size=3)
    assert len(set(said)) == 1 and re.search(rf"[:;] {name} is .* on rank 0 2", said[0])


class _Never:
    def wait(self, *_: object) -> None:
        raise RuntimeError("Timed out waiting 1000ms for recv operation to complete")


def test_a_missed_deadline_names_the_peer_and_the_hop() -> None:
    ring = Ring(members=(0, 1, 2), timeout=1.0)
    with pytest.raises(RankLost, match=r"Rank 0 waited for keys at hop 2 from rank 2: no answer within 1 s"):
        Pending(ring, "keys at hop 2", [(_Never(), 2, "from")], ()).wait()  # type: ignore[list-item]
    with pytest.raises(RankLost, match="The ring is broken"):
        ring.exchange("keys", "keys at hop 1", [Message(1, (torch.zeros(1),))])


# -- calls that share -----------------------------------------------------------------------------------------------------


def test_calls_that_differ_in_one_number_do_not_share_a_plan() -> None:
    ring, layout = Ring.alone(), Layout.contiguous(20, 1)
    q, k, v = torch.randn(3, 1, 20, 2, 8, dtype=torch.float64).unbind()
    for attention in (Attention(scale=0.2), Attention(scale=0.9), Attention(pattern=p.causal() & p.window(3)), Attention(dropout=0.5)):
        out = ring_attention(q, k, v, ring=ring, layout=layout, attention=attention, seed=1)
        assert isinstance(out, Tensor) and error(out, dense(attention, q, k, v, seed=1).out) < 1e-12


def test_a_batch_may_be_cut_anywhere_and_drops_the_same() -> None:
    ring, layout, attention = Ring.alone(), Layout.contiguous(20, 1), Attention(dropout=0.5)
    q, k, v = torch.randn(3, 3, 20, 2, 8, dtype=torch.float64).unbind()
    whole = ring_attention(q, k, v, ring=ring, layout=layout, attention=attention, seed=5)
    part = ring_attention(q[1:], k[1:], v[1:], ring=ring, layout=layout, attention=attention, seed=5, batch_offset=1)
    assert isinstance(whole, Tensor) and isinstance(part, Tensor) and error(part, whole[1:]) < 1e-12


def test_query_heads_read_the_key_head_of_their_group() -> None:
    (group,) = head_groups(Attention(), 8, 2)
    assert group.keys == (0, 1) and group.rows == tuple(range(8))
    (group,) = head_groups(Attention(), 8, 2, range(3, 6), 0)
    assert group.heads == (3, 4, 5) and group.rows == (0, 1, 2) and group.keys == (0, 1, 1)


# -- over gloo ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rotate", "double", "heads_uneven", "usp", "pass_q", "dropout"])
def test_over_gloo_too(pool: Pool, name: str) -> None:
    asked = EXACT[name]
    assert not wrong(asked, pool.run(on_rank, asked, size=asked.size, fold=asked.fold))


def test_virtual_ranks_say_when_all_of_them_wait() -> None:
    with pytest.raises(virtual.Stuck, match="rank 0 waits for news from rank 1; rank 1 waits for news from rank 0"):
        virtual.run(_waits, size=2)


def _waits(ring: Any) -> None:
    ring.exchange("news", "news", [Message(1 - ring.rank, (torch.zeros(1),))]).wait()


def test_folds_reach_virtual_rings() -> None:
    assert virtual.run(lambda ring: (ring.heads, ring.nodes), size=4, fold=Fold(2, 2)) == [(2, 2)] * 4
