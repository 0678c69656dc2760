"""Any layout x any pattern x scores x transport x world size x dtype is exact: cases that nobody chose.

Layouts are arbitrary partitions and patterns arbitrary expressions, so that nothing rests on the stock ones' regularity.
"""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ringctx import Layout
from ringctx import patterns as p
from ringctx.core.pattern import Pattern
from tests.cases import ROUTES, SCORES, Case, on_rank
from tests.exact import judge, wrong
from tests.pool import Pool

PROFILE = settings(
    max_examples=80,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)

ATOMS = st.one_of(
    st.just(p.causal()),
    st.builds(p.window, st.integers(1, 40)),
    st.builds(p.sinks, st.integers(0, 12)),
    st.builds(p.prefix, st.integers(0, 40)),
    st.builds(p.dilated, st.integers(1, 9)),
    st.builds(p.strided, st.integers(1, 9)),
    st.integers(1, 9).flatmap(lambda l: st.builds(p.fixed, st.just(l), st.integers(1, l))),
    st.builds(p.global_tokens, st.sets(st.integers(0, 60), min_size=1, max_size=4)),
    st.builds(p.documents, ids=st.lists(st.integers(0, 4), min_size=130, max_size=130)),
)


def _combined(inner: st.SearchStrategy[Pattern]) -> st.SearchStrategy[Pattern]:
    return st.one_of(
        st.builds(lambda a, b: a & b, inner, inner), st.builds(lambda a, b: a | b, inner, inner), st.builds(lambda a: ~a, inner)
    )


EXPRESSIONS = st.recursive(ATOMS, _combined, max_leaves=4)


@st.composite
def partitions(draw: st.DrawFn, size: int, length: int) -> Layout:
    """Runs of tokens dealt to ranks at will; some ranks get much, some nothing."""
    cuts = sorted(draw(st.sets(st.integers(1, max(1, length - 1)), max_size=9)) | {0, length})
    runs = [range(a, b) for a, b in zip(cuts, cuts[1:], strict=False) if b <= length]
    owners = draw(st.lists(st.integers(0, size - 1), min_size=len(runs), max_size=len(runs)))
    return Layout(tuple(tuple(r for r, o in zip(runs, owners, strict=True) if o == rank) for rank in range(size)))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A small case of anything."""
    route = draw(st.sampled_from(sorted(ROUTES)))
    fold = ROUTES[route][1]
    size = draw(st.sampled_from([n for n in (1, 2, 3, 4) if n % (fold.heads * fold.nodes) == 0]))
    length = draw(st.sampled_from([7, 8, 31, 64, 101]))
    scores = draw(st.sampled_from(SCORES))
    widths = draw(st.sampled_from([(8, 8), (32, 16)] if scores.startswith("coca") else [(8, 8), (32, 16), (33, 7)]))  # CoCA pairs all dims
    layout = draw(st.one_of(st.sampled_from(["contiguous", "zigzag", "striped", "residue", "documents"]), partitions(size, length)))
    return Case(
        size=size,
        length=length,
        layout=layout,
        pattern=draw(EXPRESSIONS),
        route=route,
        dtype=draw(st.sampled_from(["fp64", "fp32"])),
        heads=draw(st.sampled_from([(1, 1), (4, 2), (3, 1), (5, 5)])),
        widths=widths,
        batch=draw(st.integers(1, 2)),
        scores=scores,
        keys=draw(st.sampled_from(["same", "moved", "gaps", "one_rank"])),
        lse=draw(st.booleans()),
    )


@PROFILE
@given(case=cases())
def test_anything_is_exact(pool: Pool, case: Case) -> None:
    result = judge(pool, case)
    assert "errors" in result and not wrong(result), (str(case), result)


@settings(PROFILE, max_examples=10)
@given(case=cases())
def test_the_same_call_gives_the_same_bits(pool: Pool, case: Case) -> None:
    first, second = (pool.run(on_rank, case, size=case.size, fold=case.fold) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in ("out", "lse", "dq", "dk", "dv"))
