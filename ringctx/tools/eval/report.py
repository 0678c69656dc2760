"""Report: what was measured, as a table for people, as files, and as a picture of needles or heads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from ringctx.tools.eval.asked import Asked, Result
from ringctx.tools.eval.heads import HeadsResult
from ringctx.tools.output import make_folder, printed

COLUMNS = {
    "needle": ("length", "depth", "wording", "seed", "correct"),
    "needles": ("length", "wording", "seed", "found"),
    "variables": ("length", "depth", "seed", "correct"),
    "perplexity": ("length", "windows", "tokens", "nll", "perplexity"),
    "heads": ("length", "seed", "prompt_tokens", "blocks"),
    "budgets": ("length", "policy", "keys", "loss", "exact", "in_reach"),
    "search": ("length", "budgets", "keys", "loss"),
}
"""What a person is shown of each task, before what it cost."""
COST = {
    "prefill_seconds": "read s", "answer_seconds": "answer s", "density": "density",
    "bytes": "MB sent", "memory": "peak MB", "anonymous": "anon. MB",
}  # fmt: skip
"""What it cost, by the words that head it."""
IN_BYTES = ("bytes", "memory", "anonymous")
DRAWN = ("needle", "needles", "heads", "budgets", "search")
"""Tasks with a picture."""


def text(result: Result) -> str:
    """The rows as a table for a terminal; lists and answers are left to --json, and of the ranks' memory the most is shown."""
    names = dict.fromkeys(COLUMNS[result.task]) | COST
    accuracy = "" if result.accuracy is None else f": {result.accuracy:.0%} correct"
    shown = Table(title=result.task + accuracy, title_justify="left", caption=result.protocol, caption_justify="left")
    for name, heading in names.items():
        shown.add_column(heading or name, justify="right", no_wrap=True)
    for row in result.json()["rows"]:
        shown.add_row(*(_cell(_megabytes(row[name]) if name in IN_BYTES else row[name]) for name in names))
    return printed(shown) + (_heads(result) if isinstance(result, HeadsResult) else "")


def _heads(result: HeadsResult) -> str:
    """The chosen heads, a line each, and the line that a configuration takes in `cache.recall`."""
    chosen = [head for head in result.heads if [head.layer, head.head] in result.chosen]
    lines = [f"layer {one.layer}, head {one.head}: found {one.found:.3f}, control {one.control:.3f}" for one in chosen]
    return "\n".join([*lines, f"heads: {result.chosen}", ""])


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _megabytes(value: Any) -> float | None:
    """Of a number of bytes, or of the rank that has the most; None where one does not tell."""
    most = value if isinstance(value, int) else None if None in value else max(value)
    return None if most is None else most / 1e6


def check_out(asked: Asked, out: Path | None) -> None:
    """Make the folder. Raises ConfigError now, not after hours, where `write` could not write."""
    make_folder(out, draws=asked.task in DRAWN)


def write(result: Result, out: Path) -> list[Path]:
    """<task>.json and, for needles and heads, <task>.png in the folder; returns the files."""
    written = [out / f"{result.task}.json"]
    written[0].write_text(json.dumps(result.json(), ensure_ascii=False, indent=1) + "\n")
    if result.task in DRAWN:
        written.append(out / f"{result.task}.png")
        if isinstance(result, HeadsResult):
            _draw_heads(result, written[1])
        elif result.task in ("budgets", "search"):
            _draw_budgets(result, written[1])
        else:
            _draw_needles(result, written[1])
    return written


def cells(result: Result) -> dict[tuple[int, float], tuple[int, int]]:
    """How many needles were found and how many tried, by length and depth; seeds and wordings are added up."""
    counts: dict[tuple[int, float], tuple[int, int]] = {}
    for row in result.rows:
        for depth, is_correct in row.tried:
            assert depth is not None
            found, tried = counts.get((row.length, depth), (0, 0))
            counts[row.length, depth] = (found + is_correct, tried + 1)
    return counts


def _draw_needles(result: Result, path: Path) -> None:
    """Length across, depth down, green where all were found and red where none; found/tried where there were several."""
    from matplotlib.figure import Figure

    counts = cells(result)
    lengths, depths = sorted({length for length, _ in counts}), sorted({depth for _, depth in counts})
    figure = Figure(figsize=(2 + 0.9 * len(lengths), 2 + 0.4 * len(depths)), layout="constrained")
    axes = figure.subplots()
    shares = [[counts[length, depth][0] / counts[length, depth][1] for length in lengths] for depth in depths]
    axes.imshow(shares, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.3g}" for depth in depths])
    if any(tried > 1 for _, tried in counts.values()):
        for (length, depth), (found, tried) in counts.items():
            axes.text(lengths.index(length), depths.index(depth), f"{found}/{tried}", ha="center", va="center")
    axes.set(xlabel="tokens", ylabel="depth", title=f"needles found: {result.accuracy:.0%}")
    figure.savefig(path, dpi=150)


def _draw_budgets(result: Result, path: Path) -> None:
    """Keys across, loss or (where that is known) exact answers up; a panel a length, a line a policy, level where all is kept.

    Grey: the share of answers that lie within the latest so many tokens.
    """
    from matplotlib.figure import Figure

    rows = result.json()["rows"]
    lengths, policies = sorted({row["length"] for row in rows}), list(dict.fromkeys(row["policy"] for row in rows))
    what, says = ("exact", "exact answers") if rows[0]["in_reach"] is not None else ("loss", "-log p of a token")
    figure = Figure(figsize=(1.5 + 3.5 * len(lengths), 4), layout="constrained")
    for axes, length in zip(figure.subplots(1, len(lengths), sharey=True, squeeze=False)[0], lengths, strict=True):
        for number, policy in enumerate(policies):
            points = sorted((row["keys"], row[what]) for row in rows if (row["length"], row["policy"]) == (length, policy))
            if policy == "whole":
                axes.axhline(points[0][1], linestyle=":", color="black", label=policy)
            elif points:
                axes.plot(*zip(*points, strict=True), "o-", color=f"C{number}", label=policy)
        if what == "exact":
            reach = sorted({(row["keys"], row["in_reach"]) for row in rows if row["length"] == length and row["policy"] != "whole"})
            axes.plot(*zip(*reach, strict=True), "--", color="grey", label="in reach")
        axes.set(xlabel="keys that a query sees", xscale="log", title=f"{length:,} tokens")
    figure.axes[0].set_ylabel(says)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path, dpi=150)


def _draw_heads(result: HeadsResult, path: Path) -> None:
    """Head across, layer down, bright where found - control is large; the chosen have a ring."""
    from matplotlib.figure import Figure

    num_layers, num_heads = result.heads[-1].layer + 1, result.heads[-1].head + 1
    gains = [one.gain for one in result.heads]
    figure = Figure(figsize=(2.5 + 0.3 * num_heads, 1.5 + 0.25 * num_layers), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow([gains[n : n + num_heads] for n in range(0, len(gains), num_heads)], cmap="viridis", vmin=0, vmax=1, aspect="auto")
    layers, heads = zip(*result.chosen, strict=True)
    axes.scatter(heads, layers, facecolors="none", edgecolors="red")
    axes.set(xlabel="head", ylabel="layer", title="found - control")
    figure.colorbar(image)
    figure.savefig(path, dpi=150)
