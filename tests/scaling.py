"""`python -m tests.scaling`: processor time from 1 to 8 ranks, and memory a call takes besides its tensors, as Markdown.

With as many tokens a rank, a window shows more pairs a token the more ranks there are, since the first tokens see few; so time is given
for a pair that is seen. Beside each ring stand as many processes that know nothing of each other: two virtual cores of one physical core
slow each other down, and so do more processes than cores, which is the machine's doing and not the ring's. One rank is two such processes.
"""

from __future__ import annotations

import statistics
import time
from itertools import product
from pathlib import Path

import click
import torch

from ringctx import Attention, Layout, Ring, ring_attention
from ringctx import patterns as p
from ringctx.device import held_memory, keep_freed_memory
from tests.pool import Pool
from tests.training_memory import highest

HEADS, WIDTH, WINDOW, IN_ALL = 8, 64, 1024, 16_384
SIZES = (1, 2, 4, 8)
COLUMNS = f"""| ranks | window {WINDOW:,}, as many tokens a rank: ns a pair | each alone | causal, {IN_ALL:,} tokens in all: ms a call |
|---|---|---|---|"""


def processor_seconds(ring: Ring, tokens: int, window: int, dtype: str, alone: bool) -> float:
    """Of this rank's call, forward and backward, in the layout that suits the pattern, the median of three after a first one; alone: as a
    ring of one."""
    torch.set_num_threads(1)
    keep_freed_memory()
    ring = Ring.alone() if alone else ring
    attention = Attention(p.causal() & p.window(window) if window else p.causal())
    layout = Layout.contiguous(tokens, ring.size) if window else Layout.zigzag(tokens, ring.size)
    make = torch.Generator().manual_seed(ring.rank)
    *x, dout = (torch.randn(1, layout.count(ring.rank), HEADS, WIDTH, generator=make).to(getattr(torch, dtype)) for _ in range(4))
    x = [one.requires_grad_() for one in x]
    found = []
    for _ in range(4):
        began = time.process_time()
        out = ring_attention(*x, ring=ring, layout=layout, attention=attention)
        torch.autograd.grad(out, x, dout)
        found.append(time.process_time() - began)
    return statistics.median(found[1:])


def extra_memory(ring: Ring, tokens: int, dtype: str) -> float:
    """Megabytes at the peak of a rank's first call over what the process held before it with the call's own tensors."""
    torch.set_num_threads(1)
    layout, kind = Layout.zigzag(tokens, ring.size), getattr(torch, dtype)
    *x, dout = (torch.randn(1, layout.count(ring.rank), HEADS, WIDTH).to(kind) for _ in range(4))
    x = [one.requires_grad_() for one in x]
    before = held_memory(torch.device("cpu"))
    Path("/proc/self/clear_refs").write_text("5")
    out = ring_attention(*x, ring=ring, layout=layout, attention=Attention())
    torch.autograd.grad(out, x, dout)
    return (highest() - before) / 1e6


@click.command()
@click.option("--tokens", default=2048, show_default=True, help="A rank, under the window.")
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--rounds", default=5, show_default=True)
def main(tokens: int, dtype: str, rounds: int) -> None:
    """Measure."""
    with Pool(ring_timeout=120.0, first=8) as pool:
        found: dict[tuple[int, int, bool], list[float]] = {}
        for _ in range(rounds):  # in turns, so that a machine that slows down slows all
            for size, (window, alone) in product(SIZES, ((WINDOW, False), (WINDOW, True), (0, False))):
                if window and not alone and size == 1:
                    continue  # as two processes alone
                given = (tokens * (1 if alone else size) if window else IN_ALL, window, dtype, alone or size == 1)
                ranks = pool.run(processor_seconds, *given, size=max(size, 2), timeout=900.0)
                found.setdefault((max(size, 2) if alone else size, window, alone), []).append(statistics.mean(ranks))
        click.echo(COLUMNS)
        for size in SIZES:
            alone = statistics.median(found[max(size, 2), WINDOW, True])
            ring, whole = (statistics.median(found.get((size, window, False), [alone])) for window in (WINDOW, 0))
            pairs, of_one = (HEADS * sum(min(n + 1, WINDOW) for n in range(tokens * many)) for many in (size, 1))
            click.echo(f"| {size} | {1e9 * size * ring / pairs:.2f} | {1e9 * alone / of_one:.2f} | {1000 * size * whole:.0f} |")
    with Pool(ring_timeout=120.0, first=2) as pool:
        found = pool.run(extra_memory, 8192, dtype, size=2)
        click.echo(f"\nMemory besides the tensors, 8,192 tokens on 2 ranks, causal, forward and backward: {max(found):.0f} MB a rank")


if __name__ == "__main__":
    main()
