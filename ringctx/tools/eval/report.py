"""Report: what was measured, as a table for people, as files, and as a picture of the needles."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ringctx.errors import ConfigError
from ringctx.tools.eval.asked import Asked, Result


def text(result: Result) -> str:
    """The rows as a table for a terminal; lists and answers are left to --json."""
    names = {"needle": ("length", "depth", "correct"), "perplexity": ("length", "tokens", "nll", "perplexity")}[result.task]
    names = (*names, "seconds", "density", "bytes")
    accuracy = "" if result.accuracy is None else f": {result.accuracy:.0%} correct"
    shown = Table(title=result.task + accuracy, title_justify="left", caption=result.protocol, caption_justify="left")
    for name in names:
        shown.add_column(name, justify="right")
    for row in result.json()["rows"]:
        shown.add_row(*(_cell(row[name]) for name in names))
    console = Console()
    with console.capture() as captured:
        console.print(shown)
    return captured.get()


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def check_out(asked: Asked, out: Path | None) -> None:
    """Raise ConfigError now, not after hours, where `write` could not write."""
    if out is None:
        return
    if asked.task == "needle" and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "--out draws a heat map of needles with matplotlib, which is not installed; "
            "pip install 'ringctx[plot]', or leave --out out and keep what --json prints."
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {str(out)!r} cannot be made ({error.strerror}); give a folder that can be written.") from error


def write(result: Result, out: Path) -> list[Path]:
    """<task>.json and, for needles, needle.png in the folder; returns the files."""
    written = [out / f"{result.task}.json"]
    written[0].write_text(json.dumps(result.json(), ensure_ascii=False, indent=1) + "\n")
    if result.task == "needle":
        written.append(out / "needle.png")
        _draw(result, written[1])
    return written


def _draw(result: Result, path: Path) -> None:
    """Length across, depth down, green where the number was found and red where not; equal cells are averaged."""
    from matplotlib.figure import Figure

    lengths, depths = sorted({row.length for row in result.rows}), sorted({row.depth for row in result.rows if row.depth is not None})
    found = [[_share(result, length, depth) for length in lengths] for depth in depths]
    figure = Figure(figsize=(2 + 0.9 * len(lengths), 2 + 0.4 * len(depths)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(found, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set(xlabel="tokens", ylabel="depth", title=f"needles found: {result.accuracy:.0%}")
    figure.savefig(path, dpi=150)


def _share(result: Result, length: int, depth: float) -> float:
    cell = [bool(row.correct) for row in result.rows if (row.length, row.depth) == (length, depth)]
    return sum(cell) / len(cell)
