"""`python -m tests.native`: the native kernel against aten's on one thread, causal, in turn, as Markdown."""

from __future__ import annotations

import statistics
import time
from itertools import product

import click
import torch
from torch import Tensor

from ringctx.device import keep_freed_memory
from ringctx.kernels.base import Call, Kernel, TileScores
from ringctx.kernels.native import Native
from ringctx.kernels.sdpa import Sdpa

HEADS = 2
HEADER = """| dtype, width, tokens | forward: aten, ms | native, ms (GFLOP/s) | times | backward: aten, ms | native, ms (GFLOP/s) | times |
|---|---|---|---|---|---|---|"""


def timed(kernel: Kernel, x: list[Tensor], dout: Tensor, scores: TileScores) -> tuple[float, float]:
    """Seconds forward and backward."""
    began = time.perf_counter()
    out, lse = kernel.forward(*x, scores)
    middle = time.perf_counter()
    kernel.backward(dout, *x, out, lse, scores)
    return middle - began, time.perf_counter() - middle


def row(name: str, dtype: torch.dtype, width: int, tokens: int, rounds: int) -> str:
    """Medians of calls in turn."""
    make = torch.Generator().manual_seed(0)
    *x, dout = (torch.randn(1, tokens, HEADS, width, generator=make).to(dtype) for _ in range(4))
    scores, kernels = TileScores(width**-0.5, causal=True), (Sdpa(), Native())
    found = [[timed(kernel, x, dout, scores) for kernel in kernels] for _ in range(rounds + 1)][1:]
    cells = []
    for way, operations in ((0, 4), (1, 10)):
        aten, native = (statistics.median(turn[n][way] for turn in found) for n in (0, 1))
        speed = operations * width * HEADS * tokens**2 / 2 / native / 1e9
        times = statistics.median(turn[0][way] / turn[1][way] for turn in found)
        cells += [f"{1000 * aten:.1f}", f"{1000 * native:.1f} ({speed:.0f})", f"{times:.1f}"]
    return f"| {name}, {width}, {tokens:,} | {' | '.join(cells)} |"


@click.command()
@click.option("--tokens", type=int, multiple=True, default=(2_048, 8_192), show_default=True)
@click.option("--width", "widths", type=int, multiple=True, default=(64, 128), show_default=True)
@click.option("--rounds", default=7, show_default=True)
def main(tokens: tuple[int, ...], widths: tuple[int, ...], rounds: int) -> None:
    """Time every dtype that the native kernel computes here."""
    keep_freed_memory()
    torch.set_num_threads(1)
    click.echo(HEADER)
    for name, width, length in product(("bfloat16", "float32"), widths, tokens):
        dtype = getattr(torch, name)
        reason = Native().why_not(Call("cpu", dtype, HEADS, HEADS, width, width, causal=True))
        click.echo(f"| {name}, {width}: {reason} |" if reason else row(name, dtype, width, length, rounds))


if __name__ == "__main__":
    main()
