"""The simulated loop: by hand for two ranks, and laws for any: no rank is busy for longer than all, and nothing exposed on a free link."""

from __future__ import annotations

import pytest

from ringctx import Layout
from ringctx.core import loop
from ringctx.core.pattern import Pattern
from ringctx.core.plan import Plan, make_plan
from ringctx.patterns import causal, full, window
from ringctx.tools.planner.simulate import Costs, Link, backward, forward

FREE = Link(0.0, float("inf"))


def plans(pattern: Pattern, layout: Layout, transport: str = "rotate", nodes: int = 1) -> list[Plan]:
    return [make_plan((pattern,), layout, layout, rank, transport, nodes) for rank in range(layout.size)]


def costs(link: Link = FREE, **more: float) -> Costs:
    """A microsecond a pair, a byte a token."""
    return Costs(lambda rank, visit: visit.area * 1e-6, 1.0, 2.0, lambda a, b: link, **more)


def test_two_ranks_by_hand() -> None:
    made = plans(full(), Layout.contiguous(200, 2))  # each computes 100 x 100 pairs at home and as many of the other's
    work = 0.01
    assert forward(made, costs()).total == pytest.approx(2 * work)
    for seconds in (0.004, 0.01, 0.03):  # of a message of 100 bytes: hidden while it is shorter than the work at home
        times = forward(made, costs(Link(0.0, 100 / seconds)))
        assert times.total == pytest.approx(work + max(seconds, work))
        assert times.exposed == pytest.approx((max(0.0, seconds - work),) * 2)
    late = forward(made, costs(Link(0.02, float("inf"))))
    assert late.total == pytest.approx(0.03)


def test_backward_of_two_ranks_by_hand() -> None:
    made = plans(full(), Layout.contiguous(200, 2))
    times = backward(made, costs(Link(0.0, 100 / 0.004)))  # keys 0.004 over a third of home, gradients 0.008 over the rest
    assert times.total == pytest.approx(0.004 + 0.01 + 0.008)
    assert times.computing == pytest.approx((0.02, 0.02)) and times.exposed == pytest.approx((0.002, 0.002))
    hidden = backward(made, costs(Link(0.0, 100 / (0.01 / 3))))
    assert hidden.total == pytest.approx(0.02) and max(hidden.exposed) < 1e-9


def test_gradients_that_leave_in_steps_are_hidden_where_they_were_not(monkeypatch: pytest.MonkeyPatch) -> None:
    made, work = plans(full(), Layout.contiguous(2048, 2)), 1024**2 * 1e-6
    link = Link(0.0, 1024 / (0.5 * work))  # keys travel half as long as home or the visit takes, gradients as long
    whole = backward(made, costs(link))
    assert whole.total == pytest.approx(2.5 * work) and whole.exposed == pytest.approx((0.5 * work,) * 2)
    monkeypatch.setattr(loop, "STEP_BYTES", 512)
    steps = backward(made, costs(link))
    assert steps.total == pytest.approx(2 * work) and max(steps.exposed) < 1e-9
    assert steps.computing == pytest.approx(whole.computing)


def test_what_takes_the_core_is_not_hidden() -> None:
    made = plans(full(), Layout.contiguous(200, 2))
    assert forward(made, costs(Link(0.0, 100 / 0.004), hidden=0.0)).total == pytest.approx(0.024)
    assert forward(made, costs(Link(0.0, 100 / 0.004), hidden=0.5)).total == pytest.approx(0.022)
    assert forward(made, costs(post=0.001)).total == pytest.approx(0.021)


@pytest.mark.parametrize("transport", ["rotate", "fetch", "gather"])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("pattern", [causal(), full(), causal() & window(40)])
def test_laws(pattern: Pattern, size: int, transport: str) -> None:
    made = plans(pattern, Layout.zigzag(333, size), transport)
    for run in (forward, backward):
        free, slow, slower = (run(made, costs(link)) for link in (FREE, Link(1e-5, 1e5), Link(1e-3, 1e4)))
        pairs = sum(plan.cost for plan in made) * 1e-6
        for times in (free, slow, slower):
            assert sum(times.computing) == pytest.approx(pairs)
            assert times.total >= max(times.computing) - 1e-12
            assert all(c + e <= times.total + 1e-9 for c, e in zip(times.computing, times.exposed, strict=True))
        assert free.total <= slow.total + 1e-12 <= slower.total + 2e-12


def test_a_double_ring_crosses_the_slow_link_less_often() -> None:
    layout, slow = Layout.zigzag(4096, 8), Link(0.0, 2e3)
    link = lambda a, b: FREE if a // 4 == b // 4 else slow
    work = lambda rank, visit: visit.area * 1e-9
    one, two = (forward(plans(full(), layout, nodes=n), Costs(work, 1.0, 2.0, link)).total for n in (1, 2))
    assert two < 0.2 * one


def test_who_has_nothing_to_do_waits_for_nobody() -> None:
    times = forward(plans(causal(), Layout.contiguous(3, 4)), costs(Link(1e-3, 1e3)))
    assert (times.computing[0], times.exposed[0]) == (0.0, 0.0) and times.computing[3] > 0 and times.exposed[3] > 0
