"""Terminal: what `ringctx generate` shows while it works, and the summary of where the time went.

Tokens go to stdout (stderr with --json), everything else to stderr; only rank 0 shows anything.
"""

from __future__ import annotations

import json
import sys
import time
from typing import TextIO

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from ringctx.config import Config
from ringctx.core.ring import Ring
from ringctx.runtime.answer import Answer, Folders, Listener
from ringctx.runtime.engine import Engine


class PrefillBar:
    """A bar over the layers of the prefill, chunk by chunk, with tokens/s and an estimate of the time left, on stderr."""

    def __init__(self, num_layers: int, console: Console) -> None:
        self.num_layers, self.num_tokens, self.steps, self.done, self.began = num_layers, 0, num_layers, 0, 0.0
        done = TextColumn("{task.percentage:.0f} % · {task.fields[speed]} tokens/s")
        self.progress = Progress(TextColumn("{task.description}"), BarColumn(), done, TimeRemainingColumn(), console=console)
        self.task = TaskID(0)

    def start(self, num_tokens: int, num_chunks: int) -> None:
        """So many tokens are read next, in so many chunks: the document's, then the question's."""
        self.num_tokens, self.steps, self.done, self.began = num_tokens, num_chunks * self.num_layers, 0, time.perf_counter()
        self.task = self.progress.add_task(f"Reading {num_tokens:,} tokens", total=self.steps, speed="…")
        self.progress.start()

    def layer(self, number: int) -> None:
        """One layer more of a chunk is done."""
        self.done += 1
        speed = self.num_tokens * self.done / self.steps / (time.perf_counter() - self.began)
        self.progress.update(self.task, completed=self.done, speed=f"{speed:,.0f}")

    def stop(self) -> None:
        """The prefill is over."""
        self.progress.stop()


def answer(
    config: Config,
    ring: Ring,
    document: str,
    question: str,
    *,
    as_json: bool,
    began: float | None = None,
    folders: Folders = Folders(),
) -> Answer:
    """Load, read, answer; on rank 0 stream the text, then print the summary and, with as_json, one JSON object."""
    engine = Engine.load(config, ring, began=began)
    if ring.rank:
        return engine.generate(document, question, folders=folders)
    out: TextIO = sys.stderr if as_json else sys.stdout
    console = Console(stderr=True)
    bar = PrefillBar(engine.num_layers, console)

    def write(text: str) -> None:
        out.write(text)
        out.flush()

    try:
        listener = Listener(began=bar.start, layer=bar.layer, prefilled=bar.stop, text=write)
        result = engine.generate(document, question, listener, folders)
    finally:
        bar.stop()
    write("\n")
    console.print(summary(result, engine.attention_seconds))
    if as_json:
        click.echo(json.dumps(result.json(), ensure_ascii=False))
    return result


def summary(result: Answer, attention_seconds: dict[str, float]) -> Table:
    """Where the time went, in a table."""
    ranks = f"{result.ranks} rank{'s' * (result.ranks > 1)}"
    table = Table(title=f"{result.prompt_tokens:,} tokens read, {len(result.tokens)} written, on {ranks}", title_justify="left")
    for column in ("", "seconds", "of it attention", "tokens/s"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("load", f"{result.seconds.load:.2f}", "", "")
    for phase in ("prefill", "decode"):
        seconds, speed = getattr(result.seconds, phase), result.tokens_per_second[phase]
        table.add_row(phase, f"{seconds:.2f}", f"{attention_seconds.get(phase, 0.0):.2f}", f"{speed:,.1f}")
    sent = ", ".join(f"{kind} {count / 1e6:,.2f} MB" for kind, count in result.bytes.items()) or "nothing"
    memory = ", ".join(f"{count / 1e9:.2f} GB" for count in result.memory)
    table.caption = f"first token after {result.seconds.first_token:.2f} s · sent: {sent} · memory: {memory}"
    table.caption_justify = "left"
    return table
