"""Page: what is shown, as one HTML file that needs nothing beside it."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ringctx.errors import ConfigError
from ringctx.tools.show import pictures
from ringctx.tools.show.plans import Shown
from ringctx.tools.show.timelines import Rank, ranks

STYLE = """
body { font: 15px system-ui; margin: 2em auto; max-width: 90em; padding: 0 1em }
td, th { padding: .2em .8em; text-align: right }
pre { overflow: auto }
svg { max-width: 100%; height: auto }
"""


def check(out: Path) -> None:
    """Raise ConfigError where no page could be drawn or written."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("`ringctx show` draws with matplotlib, which is not installed; pip install 'ringctx[plot]'.")
    if out.suffix != ".html":
        raise ConfigError(f"--out is {str(out)!r}; a page is written: name a file that ends in .html.")


def write(out: Path, shown: Sequence[Shown], trace: dict[str, Any] | None) -> list[Path]:
    """The page, and beside it the merged trace, where there is one; returns the files."""
    parts = [part for one in shown for part in _attention(one)]
    written = [out]
    if trace is not None:
        written.append(out.with_suffix(".trace.json"))
        written[-1].write_text(json.dumps(trace) + "\n")
        parts += _times(ranks(trace), written[-1].name)
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>ringctx</title><style>{STYLE}</style>"
    out.write_text("\n".join([head, *parts, "</html>"]) + "\n")
    return written


def _attention(one: Shown) -> Iterable[str]:
    yield f"<h2>Layers {one.layers}: {escape(str(one.attention.pattern))}</h2>"
    loads = [plan.cost for plan in one.plans]
    imbalance = max(loads) * len(loads) / max(sum(loads), 1)
    yield f"<p>{sum(loads):,} query-key pairs on {len(loads)} ranks, the busiest {imbalance:.2f} times the mean.</p>"
    yield pictures.plan(one)
    yield f"<h3>Transports</h3><pre>{escape(one.choice.explain())}</pre>"
    yield f"<h3>Plans</h3><pre>{escape(chr(10).join(plan.explain() for plan in one.plans))}</pre>"


def _times(all_ranks: Sequence[Rank], name: str) -> Iterable[str]:
    yield "<h2>When it happened</h2>"
    yield f"<p>Shaded: calls. {escape(name)} has the same for ui.perfetto.dev.</p>"
    yield pictures.timeline(list(all_ranks))
    whole = ("rank", "calls s", "computing s", "posting and waiting s", "of calls, not computing %")
    yield _table(whole, [_whole(one) for one in all_ranks])
    heads = ("rank", "what", "times", "received MB", "sent MB", "exposed ms")
    rows = [
        (str(one.rank), what, str(n), f"{received / 1e6:.3f}", f"{sent / 1e6:.3f}", f"{1000 * seconds:.2f}")
        for one in all_ranks
        for what, n, received, sent, seconds in one.moved()
    ]
    yield _table(heads, rows)


def _whole(one: Rank) -> tuple[str, ...]:
    calls, computing, exposed = (one.seconds(row) for row in ("calls", "computing", "posting and waiting"))
    share = f"{100 * (calls - computing) / calls:.1f}" if calls else ""
    return str(one.rank), f"{calls:.4f}", f"{computing:.4f}", f"{exposed:.4f}", share


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) for tag, cells in (("th", heads), *(("td", row) for row in rows))]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"
