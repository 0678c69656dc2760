"""The picture of a run: training loss by step, and held-out loss and exact matches beside it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

SMOOTH = 50
"""Steps that a point of the training curve is the mean of."""


def draw(loss: list[float], held_out: list[dict[str, Any]], path: Path) -> None:
    """Write the PNG; nothing where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    means = [sum(loss[max(0, n - SMOOTH) : n]) / min(n, SMOOTH) for n in range(1, len(loss) + 1)]
    axes.plot(range(1, len(loss) + 1), means, label=f"training, mean of {SMOOTH} steps")
    for place in range(len(held_out[0]["rows"]) if held_out else 0):
        length = held_out[0]["rows"][place]["length"]
        axes.plot(
            [one["steps"] for one in held_out], [one["rows"][place]["loss"] for one in held_out], "o-", label=f"held out, {length} tokens"
        )
    axes.set(xlabel="step", ylabel="-log p of a token", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=150)
