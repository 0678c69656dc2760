"""measure: every run that was asked for, in order, with a bar on rank 0's stderr."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ringctx.config import Config
from ringctx.core.ring import Ring
from ringctx.runtime.engine import Engine, Listener
from ringctx.tools.eval import needle, perplexity
from ringctx.tools.eval.asked import Asked, Result


def measure(config: Config, ring: Ring, asked: Asked) -> Result:
    """Load the model and measure. All ranks call it together and return the same but for seconds."""
    generation = replace(config.generation, max_new_tokens=needle.ANSWER_TOKENS)
    engine = Engine.load(replace(config, generation=generation), ring)
    return _needles(engine, asked) if asked.task == "needle" else _perplexity(engine, asked)


def _needles(engine: Engine, asked: Asked) -> Result:
    cases = [(length, depth) for length in asked.lengths for depth in asked.depths]
    rows = []
    with _bar(engine, "Needles", sum(length for length, _ in cases)) as listener:
        for length, depth in cases:
            planted = needle.plant(engine, asked.text, length, depth, asked.seed)
            rows.append(needle.run(engine, planted, length, depth, listener))
    accuracy = sum(bool(row.correct) for row in rows) / len(rows)
    return Result(task=asked.task, rows=rows, accuracy=accuracy, protocol=needle.PROTOCOL.format(slack=needle.SLACK))


def _perplexity(engine: Engine, asked: Asked) -> Result:
    tokens = perplexity.tokens_of(engine, asked.text, asked.lengths[0])
    with _bar(engine, "Perplexity", len(tokens)) as listener:
        rows = perplexity.run(engine, tokens, listener)
    return Result(task=asked.task, rows=rows, accuracy=None, protocol=perplexity.PROTOCOL)


@contextmanager
def _bar(engine: Engine, title: str, num_tokens: int) -> Iterator[Listener]:
    """A bar over the tokens of all runs, layer by layer, with an estimate of the time left; nothing on ranks other than 0."""
    if engine.world.rank:
        yield Listener()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=num_tokens)
        step = 0.0

        def began(tokens: int, chunks: int) -> None:
            nonlocal step
            step = tokens / (chunks * engine.num_layers)
            progress.update(task, description=f"{title}: reading {tokens:,} tokens")

        yield Listener(began=began, layer=lambda _: progress.advance(task, step))
        progress.update(task, completed=num_tokens)
