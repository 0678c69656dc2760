"""Report: a prediction as tables for a terminal."""

from __future__ import annotations

from rich.table import Table

from ringctx.tools.output import printed
from ringctx.tools.planner.predict import Asked, Prediction

GB = 1e9


def text(prediction: Prediction, asked: Asked) -> str:
    """A line an option, the one to take first; its memory; and what takes its time."""
    rows = f", rows of {asked.tensor}" * (asked.tensor > 1)
    shown = Table(title=f"{asked.tokens:,} tokens on {asked.ranks} ranks{rows}, {asked.device.name}", title_justify="left")
    for heading in ("layout", "transport", "seconds", "attention", "the rest", "exposed", "GB sent", "hops", "imbalance", "GB a rank"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for one in prediction.options:
        seconds = [f"{one.seconds[name]:.3g}" for name in ("total", "attention", "linear", "exposed")]
        moved = [f"{one.bytes / GB:,.3g}", str(one.hops), f"{one.imbalance:.2f}", f"{one.memory['total'] / GB:.3g}"]
        shown.add_row(one.layout, one.transport, *seconds, *moved)
    parts = ", ".join(f"{name} {size / GB:.3g}" for name, size in prediction.best.memory.items() if name != "total")
    said = [f"Take the first. GB of a rank: {parts}. {prediction.why()[-1]}"]
    if prediction.best.memory["total"] > asked.device.memory:
        said.append(f"That is more than the {asked.device.memory / GB:.3g} GB of {asked.device.name}: take more ranks, or longer rows.")
    said.append(f"Seconds are simulated, from: {asked.device.source}.")
    return printed(shown) + "\n".join(said)
