"""Pictures: masks by the rank that computes them, work and bytes by rank, and timelines; each as SVG.

Knows matplotlib, and what is shown.
"""

from __future__ import annotations

from io import StringIO
from typing import Any

from ringctx.core.pattern import EMPTY, FULL
from ringctx.core.tiles import width
from ringctx.tools.show.plans import Shown
from ringctx.tools.show.timelines import Rank

MOST_PATTERNS = 6
"""Masks drawn of one attention, of as many head groups or branches."""


def plan(shown: Shown) -> str:
    """Masks, whose colour is the rank that computes a row and paler where a square is partly seen; and work and bytes by rank."""
    from matplotlib.figure import Figure

    patterns = shown.patterns[:MOST_PATTERNS]
    figure = Figure(figsize=(4 * (len(patterns) + 1), 4), layout="constrained")
    *masks, bars = figure.subplots(1, len(patterns) + 1, squeeze=False)[0]
    for axes, pattern in zip(masks, patterns, strict=True):
        _mask(axes, shown, pattern)
    _bars(bars, shown)
    return _svg(figure)


def _mask(axes: Any, shown: Shown, pattern: Any) -> None:
    squares = shown.squares
    image = []
    for q, row in zip(squares, shown.cells(pattern), strict=True):
        red, green, blue = _colour(shown.layout.owner(q[0]))
        alpha = [{EMPTY: 0.0, FULL: 1.0}.get(verdict, 0.45) for verdict in row]
        image.append([(red, green, blue, a) for a in alpha])
    end = squares[-1][-1] + 1
    axes.imshow(image, extent=(0, end, end, 0), interpolation="nearest")
    axes.set(title=str(pattern), xlabel="key", ylabel="query")
    axes.title.set_fontsize(8)


def _bars(axes: Any, shown: Shown) -> None:
    """Pairs that each rank computes, by whose keys they are; on a second axis the megabytes that it receives."""
    for plan in shown.plans:
        below = 0
        for visit in (plan.home, *(visit for hop in plan.hops for visit in hop.visits)):
            axes.bar(plan.rank, visit.area, bottom=below, color=_colour(visit.owner), edgecolor="white", linewidth=0.3)
            below += visit.area
    received = [shown.bytes_a_token * sum(width(p.spans) for hop in plan.hops for p in hop.receive) / 1e6 for plan in shown.plans]
    other = axes.twinx()
    other.plot(range(len(received)), received, "k_", markersize=14)
    other.set(ylabel="MB received (dashes)", ylim=(0, max(received, default=0) * 1.2 + 1e-9))
    axes.set(title=f"pairs by rank, coloured by the keys' owner; {shown.plans[0].transport}", xlabel="rank")
    axes.title.set_fontsize(8)


def timeline(ranks: list[Rank]) -> str:
    """Computing and what was exposed of each rank, and messages under way below them."""
    from matplotlib.figure import Figure

    rows = [(one, row) for one in ranks for row in one.rows if row != "calls"]
    figure = Figure(figsize=(14, 0.35 * len(rows) + 1), layout="constrained")
    axes = figure.subplots()
    for n, (one, row) in enumerate(rows):
        spans = [(1000 * began, 1000 * (ended - began)) for _, began, ended, _ in one.rows[row]]
        axes.broken_barh(spans, (n - 0.4, 0.8), facecolors=_shade(row), edgecolor="white", linewidth=0.2)
    for one in ranks:
        for what, began, ended, _ in one.rows.get("calls", ()):
            axes.axvspan(1000 * began, 1000 * ended, color="black", alpha=0.03 if what == "forward" else 0.06, linewidth=0)
    axes.set_yticks(range(len(rows)), [f"rank {one.rank}: {row}" for one, row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="milliseconds")
    return _svg(figure)


def _shade(row: str) -> str:
    known = {"computing": "tab:blue", "posting and waiting": "tab:red", "keys under way": "tab:green", "grads under way": "tab:olive"}
    return known.get(row, "tab:gray")


def _colour(rank: int) -> tuple[float, float, float]:
    from matplotlib import colormaps

    red, green, blue = colormaps["tab20"](rank % 10 * 2 + rank // 10 % 2)[:3]  # the ten strong colours first
    return red, green, blue


def _svg(figure: Any) -> str:
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none"}):
        written = StringIO()
        figure.savefig(written, format="svg")
    text = written.getvalue()
    return text[text.index("<svg") :]
