"""measure: every run that was asked for, in order, with a bar on rank 0's stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ringctx.config import Config
from ringctx.core.ring import Ring
from ringctx.runtime.answer import Listener
from ringctx.runtime.engine import Engine
from ringctx.tools.eval import budgets, heads, needle, perplexity, variables
from ringctx.tools.eval.asked import COUNT, HEADS, Asked, Result
from ringctx.tools.eval.asking import ANSWER_TOKENS
from ringctx.tools.eval.wordings import TO_TUNE, WORDINGS

DEFAULT_WORDING, DEFAULT_SEED = tuple(WORDINGS)[:1], (0,)


def measure(config: Config, ring: Ring, asked: Asked) -> Result:
    """Load the model and measure. All ranks call it together and return the same but for seconds and memory."""
    generation = replace(config.generation, max_new_tokens=ANSWER_TOKENS)
    config = heads.listening(config) if asked.task == "heads" else config
    engine = Engine.load(replace(config, generation=generation), ring)
    return BY_TASK[asked.task](engine, asked)


def _needle(engine: Engine, asked: Asked) -> Result:
    cases = list(product(asked.length, asked.depth, asked.wording or DEFAULT_WORDING, asked.seed or DEFAULT_SEED))
    with _bar(engine, "Needles", sum(length for length, *_ in cases)) as listener:
        rows = [needle.run_one(engine, asked.text, words, length, depth, seed, listener) for length, depth, words, seed in cases]
    return Result(task=asked.task, rows=rows, protocol=needle.ONE)


def _needles(engine: Engine, asked: Asked) -> Result:
    cases = list(product(asked.length, asked.wording or DEFAULT_WORDING, asked.seed or DEFAULT_SEED))
    depths = tuple(sorted(asked.depth)) or needle.middles(asked.count or COUNT)
    with _bar(engine, "Needles", sum(length for length, *_ in cases)) as listener:
        rows = [needle.run_several(engine, asked.text, words, length, depths, seed, listener) for length, words, seed in cases]
    return Result(task=asked.task, rows=rows, protocol=needle.SEVERAL.format(count=len(depths)))


def _variables(engine: Engine, asked: Asked) -> Result:
    cases = list(product(asked.length, asked.seed or DEFAULT_SEED))
    count, hops = asked.count or COUNT, asked.hops or 0
    with _bar(engine, "Variables", sum(length for length, _ in cases)) as listener:
        rows = [variables.run(engine, asked.text, length, count, hops, seed, listener) for length, seed in cases]
    return Result(task=asked.task, rows=rows, protocol=variables.protocol(count, hops))


def _perplexity(engine: Engine, asked: Asked) -> Result:
    if asked.stride is None or asked.tokens is None:
        tokens = perplexity.tokens_of(engine, asked.text, asked.length[0], "--length")
        with _bar(engine, "Perplexity", len(tokens)) as listener:
            rows = perplexity.one_pass(engine, tokens, listener)
        return Result(task=asked.task, rows=rows, protocol=perplexity.ONE_PASS)
    tokens = perplexity.tokens_of(engine, asked.text, asked.tokens, "--tokens")
    read = sum(end - begin for length in asked.length for begin, end in perplexity.windows(len(tokens), length, asked.stride))
    with _bar(engine, "Perplexity", read) as listener:
        rows = [perplexity.through_windows(engine, tokens, length, asked.stride, listener) for length in asked.length]
    return Result(task=asked.task, rows=rows, protocol=perplexity.WINDOWS.format(tokens=len(tokens), stride=asked.stride))


def _heads(engine: Engine, asked: Asked) -> Result:
    cases, wordings = list(product(asked.length, asked.seed or DEFAULT_SEED)), list(dict.fromkeys(asked.wording or TO_TUNE))
    recall, count = engine.config.cache.recall, asked.count or HEADS
    with _bar(engine, "Heads", sum(length for length, _ in cases)) as listener:
        runs = [heads.run(engine, asked.text, wordings, length, seed, listener) for length, seed in cases]
    all_heads = heads.judged(engine, [(found, control) for _, found, control in runs])
    return heads.HeadsResult(
        task=asked.task,
        rows=[row for row, *_ in runs],
        protocol=heads.PROTOCOL.format(wordings=len(wordings), block=recall.block, sinks=recall.sinks, recent=recall.recent, count=count),
        heads=all_heads,
        chosen=heads.best(all_heads, count),
    )


def _budgets(engine: Engine, asked: Asked) -> Result:
    policies, rows = asked.policy or budgets.POLICIES, []
    with _count(engine, "Budgets", len(asked.length) * (len(policies) * len(asked.budget))) as done:
        for length in asked.length:
            rows += budgets.curve(engine, budgets.pairs_of(engine, length), policies, asked.budget, done)
    return Result(task=asked.task, rows=rows, protocol=budgets.PROTOCOL)


def _search(engine: Engine, asked: Asked) -> Result:
    (length,), start = asked.length, (asked.budget or asked.length)[0]
    step, rise = asked.stride or max(start // 8, 1), 0.02 if asked.rise is None else asked.rise
    with _count(engine, "Search, at most", engine.num_layers**2 * start // step) as done:
        rows = budgets.search(engine, budgets.pairs_of(engine, length), start, step, rise, done)
    return Result(task=asked.task, rows=rows, protocol=budgets.SEARCH)


BY_TASK = {
    "needle": _needle,
    "needles": _needles,
    "variables": _variables,
    "perplexity": _perplexity,
    "heads": _heads,
    "budgets": _budgets,
    "search": _search,
}


@contextmanager
def _count(engine: Engine, title: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar over so many things, of which each call says that one is done; nothing on ranks other than 0."""
    if engine.world.rank:
        yield lambda: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=total)
        yield lambda: progress.advance(task)


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
