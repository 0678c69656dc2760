"""Branches on ranks: forward, backward and decode are the oracle's for every method, transport and layout; ranks that differ are told."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ringctx import Attention, Layout, LayoutError, RanksDisagree, Ring, decode_attention, ring_attention
from ringctx import patterns as p
from ringctx.core.branch import Branch
from ringctx.methods.branches import dual_chunk, rerope
from ringctx.methods.rotary import Rotary
from ringctx.testing import dense, error
from tests import virtual
from tests.cases import BRANCHES, TOLERANCE, Case, compare, on_rank, oracle, problem
from tests.exact import judge, wrong
from tests.pool import Pool
from tests.ranks.test_promises import small_tiles  # noqa: F401  (every test here runs with it: few tokens, many tiles)

ROTARY = Rotary((0.25, 0.125, 0.0625))


def case(size: int, length: int, layout: str, route: str, scores: str, **more: object) -> Case:
    """A causal case in fp64 with four query heads on two key heads, of which a part of the width is rotated."""
    shape = {"pattern": "causal", "heads": (4, 2), "widths": (12, 8), **more}
    return Case(size=size, length=length, layout=layout, route=route, scores=scores, **shape)  # type: ignore[arg-type]


PLACES = [
    (1, "contiguous", "rotate"),
    (2, "zigzag", "fetch"),
    (3, "striped", "rotate"),
    (4, "contiguous", "fetch"),
    (3, "zigzag", "pass_q"),
]
SPECIAL = [
    case(3, 41, "zigzag", "gather", "dual_chunk", lse=True),
    case(2, 41, "striped", "heads", "leaky_rerope", lse=True, batch=2),
    case(4, 42, "residue", "usp", "self_extend", lse=True),
    case(4, 42, "zigzag", "double", "rerope"),
    case(4, 42, "zigzag", "usp_pass_q", "dual_chunk"),
    case(4, 3, "contiguous", "rotate", "rerope"),  # a rank without tokens
    case(3, 42, "zigzag", "rotate", "branches_all", lse=True),
    case(4, 42, "zigzag", "heads", "branches_all", heads=(6, 3)),
    case(3, 42, "zigzag", "rotate", "rerope", pattern="per_head", heads=(4, 2)),
    case(3, 42, "zigzag", "fetch", "self_extend", pattern="causal&ids", batch=2),
    case(2, 42, "zigzag", "rotate", "dual_chunk", pattern="full"),
    case(2, 42, "zigzag", "pass_q", "streaming", pattern="causal&~sinks2", lse=True),
    case(2, 20, "zigzag", "fetch", "self_extend", keys="chunk"),
    case(3, 66, "zigzag", "fetch", "leaky_rerope", keys="gaps"),
    case(2, 300, "zigzag", "rotate", "rerope", dtype="fp32", heads=(1, 1)),
    case(2, 60, "zigzag", "rotate", "dual_chunk", dtype="fp32"),
]


def errors_of(asked: Case) -> dict[str, float]:
    """What misses the tolerance, on virtual ranks."""
    given = problem(asked)
    found = compare(given, oracle(asked, given), virtual.run(on_rank, asked, size=asked.size, fold=asked.fold))
    return {name: value for name, value in found.items() if not value <= TOLERANCE[asked.dtype]}


@pytest.mark.parametrize("place", PLACES, ids=lambda place: f"{place[1]}-{place[2]}-{place[0]}ranks")
@pytest.mark.parametrize("method", BRANCHES)
def test_every_method_is_its_definition_forward_and_backward(method: str, place: tuple[int, str, str]) -> None:
    size, layout, route = place
    assert not errors_of(case(size, 47, layout, route, method))


@pytest.mark.parametrize("asked", SPECIAL, ids=str)
def test_with_everything_else_too(asked: Case) -> None:
    assert not errors_of(asked)


@pytest.mark.parametrize("route", ["rotate", "fetch", "heads", "pass_q"])
def test_over_gloo_too(pool: Pool, route: str) -> None:
    for size, method in ((2, "dual_chunk"), (3, "rerope"), (4, "lm_infinite")):
        result = judge(pool, case(size, 53, "zigzag", route, method, lse=True))
        assert "errors" in result and not wrong(result), result


# -- decode ---------------------------------------------------------------------------------------------------------------------


def decoded(ring: Ring, asked: Case, num_new: int) -> Tensor:
    given = problem(asked)
    k, v = (given.part(x, ring.rank, given.key_layout, given.j) for x in (given.k, given.v))
    return decode_attention(given.q[:, -num_new:], k, v, key_layout=given.key_layout, ring=ring, attention=given.attention)


@pytest.mark.parametrize("num_new", [1, 3])
@pytest.mark.parametrize("method", [*BRANCHES, "sink"])
def test_decode_is_the_definition(method: str, num_new: int) -> None:
    for size, layout, heads in ((1, "zigzag", (4, 2)), (3, "striped", (4, 1)), (4, "contiguous", (2, 2))):
        asked = case(size, 61, layout, "rotate", method, heads=heads, batch=2)
        given = problem(asked)
        want = dense(given.attention, given.q[:, -num_new:], given.k, given.v, i=given.i[-num_new:]).out
        for got in virtual.run(decoded, asked, num_new, size=size):
            assert error(got, want) < TOLERANCE["fp64"]


def test_a_rank_whose_keys_no_branch_shows_still_decodes() -> None:
    asked = case(4, 64, "contiguous", "rotate", "streaming")  # two sinks on rank 0, eight keys on rank 3
    given = problem(asked)
    want = dense(given.attention, given.q[:, -1:], given.k, given.v, i=given.i[-1:]).out
    assert all(error(got, want) < TOLERANCE["fp64"] for got in virtual.run(decoded, asked, 1, size=4))


# -- what travels ------------------------------------------------------------------------------------------------------------------


def keys_sent(ring: Ring, attention: Attention, transport: str) -> int:
    layout = Layout.contiguous(96, ring.size)
    q, k, v = (torch.ones(1, layout.count(ring.rank), 2, 8, requires_grad=True) for _ in range(3))
    ring.traffic.reset()
    ring_attention(q, k, v, ring=ring, layout=layout, attention=attention, transport=transport).sum().backward()
    return sum(count for kind, count in ring.traffic.sent.items() if kind != "header")


@pytest.mark.parametrize("transport", ["rotate", "fetch", "pass_q", "heads"])
def test_a_key_travels_once_however_many_branches_see_it(transport: str) -> None:
    plain, branched = (
        sum(virtual.run(keys_sent, Attention(branches=branches), transport, size=3)) for branches in ((), dual_chunk(6, 10, ROTARY))
    )
    assert plain == branched > 0


def test_keys_that_no_branch_shows_do_not_travel() -> None:
    sees_little = Attention(branches=(Branch(p.window(5), ROTARY),))
    assert sum(virtual.run(keys_sent, sees_little, "fetch", size=3)) < sum(virtual.run(keys_sent, Attention(), "fetch", size=3)) / 10


# -- wrong requests ----------------------------------------------------------------------------------------------------------------


def call(ring: Ring, attention: Attention | list[Attention]) -> None:
    layout = Layout.zigzag(12, ring.size)
    q = torch.ones(1, layout.count(ring.rank), 2, 8)
    ring_attention(q, q, q, ring=ring, layout=layout, attention=attention[ring.rank] if isinstance(attention, list) else attention)


@pytest.mark.parametrize(
    "other",
    [rerope(5, ROTARY), rerope(4, Rotary((0.25, 0.125, 0.0626))), (), rerope(4, ROTARY)[:1]],
    ids=["window", "frequency", "none", "one"],
)
def test_ranks_with_other_branches_are_told(other: tuple[Branch, ...]) -> None:
    with pytest.raises(RanksDisagree, match="attention is .*branches .*on rank"):
        virtual.run(call, [Attention(branches=rerope(4, ROTARY)), Attention(branches=other)], size=2)


@pytest.mark.parametrize("size", [1, 2])
def test_branches_that_do_not_fit_are_refused_before_anything_moves(size: int) -> None:
    with pytest.raises(LayoutError, match="cannot encode heads of width 8"):
        virtual.run(call, Attention(branches=rerope(4, Rotary((0.1,) * 5))), size=size)
    with pytest.raises(ValueError, match="have no rotary frequencies; give the method a Rotary"):
        virtual.run(call, Attention(branches=rerope(4)), size=size)
