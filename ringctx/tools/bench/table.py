"""The rows of the benchmark as Markdown and as JSON."""

from __future__ import annotations

from dataclasses import asdict

from ringctx.tools.bench.beside import Beside
from ringctx.tools.bench.measure import Floor, Row


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    heads = ["case", "S", "ranks", "dtype", "forward ms, anchor", "backward ms, anchor", "efficiency forward", "forward + backward"]
    if any(row.floors for row in rows):
        heads += [f"{way}: kernels, messages, exposed ms; efficiency, hidden, over the larger" for way in ("forward", "backward", "both")]
    lines = [cells for row in rows for cells in (_cells(row), *(_peer_cells(row, peer) for peer in row.peers))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, ["---"] * len(heads), *lines))


def _cells(r: Row) -> list[str]:
    times = f"{r.forward_ms}, {r.anchor_forward_ms}", f"{r.backward_ms}, {r.anchor_backward_ms}"
    cells = [r.name, str(r.S), str(r.ranks), r.dtype, *times, f"{r.efficiency_forward:.2f}", f"**{r.efficiency:.2f}**"]
    if r.floors is not None:
        cells += map(_floor_cell, (r.floors.forward, r.floors.backward, r.floors.both))
    return cells


def _floor_cell(f: Floor) -> str:
    messages, hidden, larger = ("-" if x is None else text.format(x) for x, text in
                                ((f.messages_ms, "{:.1f}"), (f.hidden, "{:.0%}"), (f.over_larger, "{:.2f}")))  # fmt: skip
    return f"{f.kernels_ms}, {messages}, {f.exposed_ms}; {f.efficiency:.2f}, {hidden}, {larger}"


def _peer_cells(r: Row, peer: Beside) -> list[str]:
    cells = [f"beside it: {peer.name}", str(r.S), str(r.ranks), r.dtype]
    if peer.refused:
        return [*cells, f"not timed: {peer.refused}", "", "", ""]
    times = f"{peer.forward_ms}, {r.anchor_forward_ms}", f"{peer.backward_ms}, {r.anchor_backward_ms}"
    return [*cells, *times, f"{peer.efficiency_forward:.2f}", f"{peer.efficiency:.2f}"]


def as_json(rows: list[Row]) -> list[dict[str, object]]:
    """The rows for `--json`."""
    return [asdict(r) for r in rows]
