"""`python -m tests.decoding`: a token of an answer on ranks that share the cache, against one process that holds all of it; Markdown.

Every rank computes the token, attends to its own keys, and one reduction a layer merges what they found. The cache is filled with numbers
drawn at random: nothing has to be read. One process has as many threads as there are ranks.
"""

from __future__ import annotations

import statistics
import time

import click
import torch

from ringctx import Ring
from ringctx.config import parse
from ringctx.runtime.engine import Engine
from tests.pool import Pool

CONFIG = "model: {path: smollm2-135m-instruct, device: cpu}"
STEPS, WARM = 20, 4


def steps(ring: Ring, tokens: int, threads: int) -> tuple[list[float], dict[str, float]]:
    """Seconds of each token; and, a token, messages and bytes that this rank sends, by kind."""
    torch.set_num_threads(threads)
    engine = Engine.load(parse(CONFIG), ring)
    layouts = engine.chunks(0, tokens)
    cache = engine.begin(layouts, STEPS + WARM)
    own = layouts[0].count(ring.rank)
    cache.extend(layouts[0])
    shape = engine._shape()
    make = torch.Generator().manual_seed(ring.rank)
    for layer in range(engine.num_layers):
        k, v = (torch.randn(1, own, shape.heads, shape.width, generator=make).to(shape.dtype) for _ in range(2))
        cache.append(layer, k, v)
    taken = []
    with torch.no_grad():
        for n in range(STEPS + WARM):
            if n == WARM:
                ring.traffic.reset()
            began = time.perf_counter()
            engine._step(100 + n, cache)
            taken.append(time.perf_counter() - began)
    traffic = ring.traffic
    told = {f"{kind} messages a layer": traffic.messages[kind] / STEPS / engine.num_layers for kind in traffic.sent}
    return taken[WARM:], told | {f"{kind} bytes a token": traffic.sent[kind] / STEPS for kind in traffic.sent}


@click.command()
@click.option("--tokens", type=int, multiple=True, default=(4096, 16_384, 65_536), show_default=True)
@click.option("--rounds", default=3, show_default=True)
def main(tokens: tuple[int, ...], rounds: int) -> None:
    """Measure by turns."""
    click.echo("| keys | one process of 2 threads: ms a token | 2 ranks: ms a token | one over two |\n|---|---|---|---|")
    with Pool(ring_timeout=120.0, first=2) as pool:
        for count in tokens:
            pairs = []
            for _ in range(rounds):
                alone = pool.run(steps, count, 2, size=1, timeout=300.0)[0][0]
                ranks = pool.run(steps, count, 1, size=2, timeout=300.0)
                pairs.append([1000 * statistics.median(times) for times in (alone, ranks[0][0])])
            one, two = (statistics.median(column) for column in zip(*pairs, strict=True))
            click.echo(f"| {count:,} | {one:.1f} | {two:.1f} | {statistics.median(a / b for a, b in pairs):.2f} |")
    click.echo(f"\nOf rank 0, in the last: {ranks[0][1]}")


if __name__ == "__main__":
    main()
