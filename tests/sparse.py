"""`python -m tests.sparse`: what sparse patterns cost, as Markdown. Times against density times the dense call's, on one rank and thread:
of the whole call, its density with the diagonal's blocks, which are always there; and of what it takes more than the diagonal alone,
which holds what a token costs whatever is seen. Then, without computing anything, balance over ranks, and what is sent against what anybody
needs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

import click
import torch
from torch import Tensor

from ringctx import Attention, Layout, Ring, ring_attention
from ringctx import patterns as p
from ringctx.core.lines import Lines
from ringctx.core.pattern import Pattern
from ringctx.core.plan import make_plan
from ringctx.device import keep_freed_memory

SHARES = (0.5, 0.25, 0.1, 0.05, 0.02)
SEED = 0
Times = tuple[float, float]


def drawn(tokens: int, side: int, share: float) -> Tensor:
    """Blocks (n, n) drawn at random on and below the diagonal, and all of those on it."""
    n = -(-tokens // side)
    found = torch.rand(n, n, generator=torch.Generator().manual_seed(SEED)) < share
    return (found | torch.eye(n, dtype=torch.bool)).tril()


def random_blocks(tokens: int, side: int, share: float) -> Pattern:
    return p.causal() & p.blocks(drawn(tokens, side, share), side)


def vertical_slash(tokens: int) -> Pattern:
    """Columns that all see, and diagonals: a window and 8 more."""
    make = torch.Generator().manual_seed(SEED)
    columns = torch.randint(tokens, (64,), generator=make).tolist()
    offsets = torch.randint(tokens // 2, (8,), generator=make).tolist()
    return p.causal() & Lines(tuple(sorted(set(columns))), tuple(sorted({*range(64), *offsets})), 64)


def density(blocks: Tensor) -> float:
    """Pairs that whole blocks (n, n) show below the diagonal over those that causality shows."""
    n = len(blocks)
    return (int(blocks.sum()) - n / 2) / (n * n / 2)


def timed(x: list[Tensor], dout: Tensor, pattern: Pattern, transport: str = "auto") -> Times:
    """Seconds of the process forward and backward."""
    layout = Layout.contiguous(dout.shape[1], 1)
    began = time.process_time()
    out = ring_attention(*x, ring=Ring.alone(), layout=layout, attention=Attention(pattern), transport=transport)
    middle = time.process_time()
    torch.autograd.grad(out, x, dout)
    return middle - began, time.process_time() - middle


def by_density(tokens: int, side: int, dtype: torch.dtype, rounds: int, heads: int, width: int = 64) -> Iterator[str]:
    """A line a share of blocks."""
    make = torch.Generator().manual_seed(SEED)
    *x, dout = (torch.randn(1, tokens, heads, width, generator=make).to(dtype) for _ in range(4))
    x = [one.requires_grad_() for one in x]
    shares = dict(zip((f"{share:.0%}" for share in SHARES), SHARES, strict=True)) | {"diagonal": 0.0}
    patterns = {"dense": p.causal()} | {name: random_blocks(tokens, side, share) for name, share in shares.items()}
    found: dict[str, list[Times]] = {name: [] for name in patterns}
    for _ in range(rounds + 1):
        for name, pattern in patterns.items():
            found[name].append(timed(x, dout, pattern))
    times = {name: [statistics.median(t[n] for t in some[1:]) for n in (0, 1)] for name, some in found.items()}
    yield f"{tokens:,} tokens, blocks of {side}, {str(dtype)[6:]}: dense {1000 * times['dense'][0]:.0f} + {1000 * times['dense'][1]:.0f} ms"
    times = {name: [*ways, sum(ways)] for name, ways in times.items()}
    least = density(drawn(tokens, side, 0.0))
    for name, share in shares.items():
        found = density(drawn(tokens, side, share))
        ratios = [mine / dense / found for mine, dense in zip(times[name], times["dense"], strict=True)]
        cells = [f"{found:.3f}", *(f"{ratio:.2f}" for ratio in ratios)]
        for mine, dense, diagonal in zip(times[name], times["dense"], times["diagonal"], strict=True):
            cells.append(f"{(mine - diagonal) / dense / (found - least):.2f}" if share else "")
        yield f"| {name} | " + " | ".join(cells) + " |"


def balance(tokens: int, ranks: int) -> Iterator[str]:
    """A line a pattern: the busiest rank's pairs over the mean, by layout."""
    borders = [0, *sorted({tokens * n * n // 400 for n in range(1, 20)}), tokens]
    patterns = {
        "causal": p.causal(),
        "random blocks of 128, 10 %": random_blocks(tokens, 128, 0.1),
        "window 2,048": p.causal() & p.window(2048),
        "documents of mixed lengths": p.causal() & p.documents(cu_seqlens=borders),
        "vertical and slash": vertical_slash(tokens),
    }
    for name, pattern in patterns.items():
        cells = []
        for kind in ("zigzag", "balanced"):
            layout = Layout.zigzag(tokens, ranks) if kind == "zigzag" else Layout.balanced(tokens, ranks, Attention(pattern))
            plans = [make_plan((pattern,), layout, layout, rank, "fetch") for rank in range(ranks)]
            costs = [plan.cost for plan in plans]
            cells += [f"{max(costs) * ranks / sum(costs):.3f}"]
            if kind == "balanced":
                sent, needed = sum(plan.tokens_received for plan in plans), sum(needs_of(pattern, layout, rank) for rank in range(ranks))
                cells += [f"{sent:,}", f"{needed:,}"]
        yield f"| {name} | " + " | ".join(cells) + " |"


def needs_of(pattern: Pattern, layout: Layout, rank: int) -> int:
    """Keys of other ranks that some query of this rank sees, by the definition of the pattern."""
    i, seen = layout.indices(rank), torch.zeros(layout.length, dtype=torch.bool)
    j = torch.arange(layout.length)
    for a in range(0, len(i), 512):
        seen |= pattern.allows(i[a : a + 512], j).reshape(-1, layout.length).any(0)
    seen[i] = False
    return int(seen.sum())


TIMES = """| blocks | density | forward over density x dense | backward | both | without the diagonal: forward | backward | both |
|---|---|---|---|---|---|---|---|"""
BALANCE = "| pattern | busiest over mean, zigzag | balanced | keys sent | keys needed |\n|---|---|---|---|---|"


@click.command()
@click.option("--tokens", default=16_384, show_default=True)
@click.option("--side", "sides", type=int, multiple=True, default=(128, 512), show_default=True)
@click.option("--dtype", "dtypes", type=click.Choice(["bfloat16", "float32"]), multiple=True, default=("bfloat16",), show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--heads", default=8, show_default=True, help="Of 64; ratios do not depend on them, and few make long sequences quick.")
@click.option("--ranks", default=4, show_default=True, help="Of the table of balance; 0 leaves it out.")
def main(tokens: int, sides: tuple[int, ...], dtypes: tuple[str, ...], rounds: int, heads: int, ranks: int) -> None:
    """Measure, in a process that keeps freed memory, as those that read and train do."""
    keep_freed_memory()
    torch.set_num_threads(1)
    for dtype in dtypes:
        for side in sides:
            title, *lines = by_density(tokens, side, getattr(torch, dtype), rounds, heads)
            click.echo("\n".join(["", title, "", TIMES, *lines]))
    if not ranks:
        return
    click.echo(f"\n{tokens:,} tokens on {ranks} ranks\n\n{BALANCE}")
    for line in balance(tokens, ranks):
        click.echo(line)


if __name__ == "__main__":
    main()
