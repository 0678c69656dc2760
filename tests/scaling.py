"""`python -m tests.scaling`: processor time from 1 to 8 ranks, and memory a call takes besides its tensors, as Markdown.

With as many tokens a rank, a window shows more pairs a token the more ranks there are, since the first tokens see few; so time is also
given for a pair that is seen. One rank is measured as two that know nothing of each other, so that it shares the machine as others do:
two virtual cores of one physical core slow each other down.
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
from ringctx.device import held_memory
from tests.pool import Pool
from tests.training_memory import highest

HEADS, WIDTH, WINDOW = 8, 64, 1024
HEADS_OF_TABLE = """| ranks | window 1,024, as many tokens a rank: ms a 1,000 tokens | ns a pair | causal, as many in all: ms a call |
|---|---|---|---|"""


def call(ring: Ring, tokens: int, attention: Attention, dtype: torch.dtype) -> None:
    """Forward and backward of this rank's share of zeros and ones."""
    layout = Layout.zigzag(tokens, ring.size)
    make = torch.Generator().manual_seed(ring.rank)
    *x, dout = (torch.randn(1, layout.count(ring.rank), HEADS, WIDTH, generator=make).to(dtype) for _ in range(4))
    x = [one.requires_grad_() for one in x]
    out = ring_attention(*x, ring=ring, layout=layout, attention=attention)
    torch.autograd.grad(out, x, dout)


def processor_seconds(ring: Ring, tokens: int, window: int, dtype: str, alone: bool) -> float:
    """Of this rank's second call; alone: as a ring of one."""
    torch.set_num_threads(1)
    attention = Attention(p.causal() & p.window(window) if window else p.causal())
    for _ in range(2):
        began = time.process_time()
        call(Ring.alone() if alone else ring, tokens, attention, getattr(torch, dtype))
    return time.process_time() - began


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
@click.option("--tokens", default=2048, show_default=True, help="A rank, or in all where causal.")
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--rounds", default=5, show_default=True)
def main(tokens: int, dtype: str, rounds: int) -> None:
    """Measure."""
    with Pool(ring_timeout=120.0, first=8) as pool:
        found: dict[tuple[int, int], list[float]] = {}
        for _ in range(rounds):  # in turns, so that a machine that slows down slows all
            for size, window in product((1, 2, 4, 8), (WINDOW, 0)):
                given = (tokens * size if window else 8 * tokens, window, dtype, size == 1)
                ranks = pool.run(processor_seconds, *given, size=max(size, 2), timeout=900.0)
                found.setdefault((size, window), []).append(sum(ranks) * size / len(ranks))
        click.echo(HEADS_OF_TABLE)
        for size in (1, 2, 4, 8):
            pairs = HEADS * sum(min(n + 1, WINDOW) for n in range(tokens * size))
            near, whole = (statistics.median(found[size, window]) for window in (WINDOW, 0))
            click.echo(f"| {size} | {1e6 * near / (tokens * size):.1f} | {1e9 * near / pairs:.2f} | {1000 * whole:.0f} |")
    with Pool(ring_timeout=120.0, first=2) as pool:
        found = pool.run(extra_memory, 8192, dtype, size=2)
        click.echo(f"\nMemory besides the tensors, 8,192 tokens on 2 ranks, causal, forward and backward: {max(found):.0f} MB a rank")


if __name__ == "__main__":
    main()
