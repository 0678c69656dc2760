"""Report: what was measured, as a table for people, as a file, and as pictures."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ringctx.tools.inspect.measure import Head, Result
from ringctx.tools.output import printed

ENOUGH = 0.95
"""The share of attention's weight that is much."""
NEAR = 64
"""Distances below this are near."""
PANELS: dict[str, Callable[[Result, Head], float]] = {
    "relative entropy": lambda _, head: head.relative_entropy,
    "effective keys": lambda _, head: head.effective_count,
    "weight on first keys": lambda _, head: head.first,
    f"weight nearer than {NEAR}": lambda result, head: near(result, head),
}


@contextmanager
def bar(is_shown: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar of layers on the terminal, with an estimate of the time left; what is yielded is told of each layer, of how many."""
    if not is_shown:
        yield lambda layer, layers: None
        return
    with Progress(*Progress.get_default_columns(), console=Console(stderr=True)) as progress:
        task = progress.add_task("Layers", total=None)
        yield lambda layer, layers: progress.update(task, completed=layer + 1, total=layers)


def near(result: Result, head: Head) -> float:
    """The weight on keys nearer than NEAR."""
    return sum(weight for edge, weight in zip(result.edges, head.distance, strict=True) if edge < NEAR)


def text(result: Result) -> str:
    """A line a layer, the means of its heads, and what each selector keeps."""
    shown = Table(title=f"{result.tokens:,} tokens on {result.ranks} ranks, {result.rows} rows", title_justify="left")
    for heading in ("layer", "entropy", "of equal", "eff. keys", "hoyer", "largest", "first", f"< {NEAR}"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for layer in sorted({head.layer for head in result.heads}):
        some = [head for head in result.heads if head.layer == layer]
        of = [
            [getattr(head, name) for head in some]
            for name in ("entropy", "relative_entropy", "effective_count", "hoyer", "largest", "first")
        ]
        shown.add_row(str(layer), *(f"{mean(values):.3g}" for values in of), f"{mean(near(result, head) for head in some):.3g}")
    kept = Table(title="What selectors keep", title_justify="left")
    for heading in ("selector", "weight", "of keys", f"heads with {ENOUGH:.0%}"):
        kept.add_column(heading, justify="right", no_wrap=True)
    for kind in result.heads[0].selectors:
        pairs = [head.selectors[kind] for head in result.heads]
        many = sum(pair["retained"] >= ENOUGH for pair in pairs)
        weight, density = (mean(pair[name] for pair in pairs) for name in ("retained", "density"))
        kept.add_row(kind, f"{weight:.1%}", f"{density:.1%}", f"{many} of {len(pairs)}")
    return printed(shown, *[kept] * bool(result.heads[0].selectors))


def write(result: Result, out: Path) -> list[Path]:
    """inspect.json, heads.png, distance.png and, of selectors, selectors.png; returns the files."""
    written = [out / "inspect.json"]
    written[0].write_text(json.dumps(result.json()) + "\n")
    for name, draw in (("heads", _draw_heads), ("distance", _draw_distance), ("selectors", _draw_selectors)):
        if name != "selectors" or result.heads[0].selectors:
            written.append(out / f"{name}.png")
            draw(result, written[-1])
    return written


def _grid(result: Result, of: Callable[[Head], float]) -> list[list[float]]:
    """A number of every head, a row a layer."""
    layers = sorted({head.layer for head in result.heads})
    return [[of(head) for head in result.heads if head.layer == layer] for layer in layers]


def _draw_heads(result: Result, path: Path) -> None:
    """Four maps, layers down and heads across."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(12, 6), layout="constrained")
    for axes, (name, of) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        scale: dict[str, Any] = {"norm": LogNorm(1, result.tokens)} if name == "effective keys" else {"vmin": 0, "vmax": 1}
        drawn = axes.imshow(_grid(result, partial(of, result)), aspect="auto", cmap="viridis", **scale)
        axes.set(title=name, xlabel="head", ylabel="layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.colorbar(drawn, ax=axes)
    figure.suptitle(f"{result.tokens:,} tokens, {result.rows} rows")
    figure.savefig(path, dpi=150)


def _draw_distance(result: Result, path: Path) -> None:
    """Left: layers down, distances across, the mean of heads. Right: weight within a distance, a line a head, by layer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    layers = sorted({head.layer for head in result.heads})
    means = [[mean(column) for column in zip(*(h.distance for h in result.heads if h.layer == layer), strict=True)] for layer in layers]
    drawn = left.imshow(means, aspect="auto", cmap="magma", vmin=0)
    left.set_xticks(range(len(result.edges)), [_short(edge) for edge in result.edges], rotation=90)
    left.set(title="weight by distance, mean of heads", xlabel="distance from", ylabel="layer")
    figure.colorbar(drawn, ax=left)
    ends = [1, *(2 * edge for edge in result.edges[1:])]
    for head in result.heads:
        shade = head.layer / max(layers[-1], 1)
        right.plot(ends, _within(head.distance), color=(shade, 0.3, 1 - shade), alpha=0.35, linewidth=0.8)
    right.set_xscale("log", base=2)
    right.set(title="weight within a distance, a line a head (blue: first layers)", xlabel="distance below", ylabel="weight")
    figure.savefig(path, dpi=150)


def _draw_selectors(result: Result, path: Path) -> None:
    """Density across, retained weight up, a point a head, a colour a selector; means are crosses."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for n, kind in enumerate(result.heads[0].selectors):
        pairs = [head.selectors[kind] for head in result.heads]
        x, y = ([pair[name] for pair in pairs] for name in ("density", "retained"))
        axes.scatter(x, y, s=8, alpha=0.4, color=f"C{n}", label=kind)
        axes.scatter([mean(x)], [mean(y)], marker="X", s=90, color=f"C{n}", edgecolor="black")
    axes.set(xlabel="share of keys kept", ylabel="share of weight kept", title=f"{result.tokens:,} tokens; crosses: means", xscale="log")
    axes.legend()
    figure.savefig(path, dpi=150)


def _within(weights: Sequence[float]) -> list[float]:
    found, total = [], 0.0
    for weight in weights:
        total += weight
        found.append(total)
    return found


def _short(edge: int) -> str:
    return f"{edge // 1024}k" if edge >= 1024 else str(edge)
