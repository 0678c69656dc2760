"""Report: what was measured, as tables for people, as a file, and as a picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ringctx.tools.extrapolate.measure import Asked, Result, Row, mean_of
from ringctx.tools.output import printed

LARGEST = 2.0
"""Nats above the best loss up to which the picture goes: what is worse does not extrapolate."""


@contextmanager
def bar(asked: Asked, is_shown: bool) -> Iterator[Callable[[Row], None]]:
    """A bar of measurements on the terminal, with an estimate of the time left; training has bars of its own."""
    if not is_shown:
        yield lambda row: None
        return
    with Progress(*Progress.get_default_columns(), console=Console(stderr=True)) as progress:
        task = progress.add_task("Measuring", total=len(asked.methods) * len(asked.length) * len(asked.seed), visible=False)
        yield lambda row: progress.update(task, advance=1, visible=True, description=f"{row.method}, {row.length} tokens")


def text(result: Result) -> str:
    """The mean loss over seeds and, where passkeys were hidden, the share of digits found; ± half of what seeds differ by."""
    tables = [_table(result, "loss", f"Loss of the same {result.trained} tokens, by how many are read", "{:.3f}")]
    if any(row.digits is not None for row in result.rows):
        tables.append(_table(result, "digits", "Digits of passkeys found (chance: 10 %)", "{:.1%}"))
    return printed(*tables)


def _table(result: Result, of: str, title: str, form: str) -> Table:
    lengths = sorted({row.length for row in result.rows})
    shown = Table(title=f"{title}; trained on {result.trained}", title_justify="left")
    shown.add_column("method", no_wrap=True)
    for length in lengths:
        shown.add_column(f"{length:,}", justify="right", no_wrap=True)
    for method in dict.fromkeys(row.method for row in result.rows):
        found = [mean_of(result.rows, method, length, of) for length in lengths]
        shown.add_row(
            method, *("" if one is None else form.format(one[0]) + f" ±{form.format(one[1] / 2)}" * (one[1] > 0) for one in found)
        )
    return shown


def write(result: Result, out: Path) -> list[Path]:
    """extrapolate.json and extrapolate.png; returns the files."""
    written = [out / "extrapolate.json", out / "extrapolate.png"]
    written[0].write_text(json.dumps(result.json()) + "\n")
    _draw(result, written[1])
    return written


def _draw(result: Result, path: Path) -> None:
    """Loss against length, a line a method and a shade from the best to the worst seed; beside it digits of passkeys."""
    from matplotlib.figure import Figure

    kinds = ["loss"] + ["digits"] * any(row.digits is not None for row in result.rows)
    figure = Figure(figsize=(7 * len(kinds), 6), layout="constrained")
    lengths = sorted({row.length for row in result.rows})
    best = min(row.loss for row in result.rows)
    for axes, of in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        for n, method in enumerate(dict.fromkeys(row.method for row in result.rows)):
            found = [mean_of(result.rows, method, length, of) for length in lengths]
            means = [one[0] if one else float("nan") for one in found]
            half = [one[1] / 2 if one else 0.0 for one in found]
            style = {"color": f"C{n % 10}", "linestyle": "-" if n < 10 else "--"}
            axes.plot(lengths, means, marker="o", markersize=3, label=method, **style)
            low, high = ([m + sign * h for m, h in zip(means, half, strict=True)] for sign in (-1, 1))
            axes.fill_between(lengths, low, high, alpha=0.15, color=style["color"], linewidth=0)
        axes.axvline(result.trained, color="grey", linewidth=0.8, linestyle=":")
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.set(xlabel=f"tokens read (trained on {result.trained})", ylabel="loss" if of == "loss" else "digits found")
        axes.set_ylim(*((best - 0.1, best + LARGEST) if of == "loss" else (0, 1)))
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
