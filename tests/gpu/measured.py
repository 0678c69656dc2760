"""What a GPU gives, as one Markdown page: `python -m tests.gpu.measured`. One process, one GPU; nothing is sent.

Times are medians over rounds in which all that a table compares takes its turn. A rank of a larger ring is measured alone: what it would
receive is there at once, so its time is that of its kernels and of the calls around them, which is the floor of the ring.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import click
import torch
from torch import Tensor

from ringctx import Attention, Layout, ring_attention
from ringctx import patterns as p
from ringctx.core.pattern import Pattern
from ringctx.core.ring import Ring
from ringctx.kernels import REGISTRY, Call
from ringctx.tools.floors import Silent
from tests.sparse import SHARES, random_blocks

ROUNDS = 7
Shape = tuple[int, int, int]
"""Query heads, key heads, width."""


def seconds(jobs: dict[str, Callable[[], Any]], rounds: int = ROUNDS) -> dict[str, float]:
    """Median seconds of each job, all of them in turn in every round; the first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds + 1):
        for name, job in jobs.items():
            torch.cuda.synchronize()
            began = time.perf_counter()
            job()
            torch.cuda.synchronize()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def tensors(tokens: int, shape: Shape, backward: bool, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """q, k, v and dout."""
    h, g, d = shape
    found = [torch.randn(1, tokens, n, d, device="cuda", dtype=dtype) for n in (h, g, g, h)]
    return [x.requires_grad_(backward) for x in found[:3]] + found[3:]


def once(attend: Callable[[Tensor, Tensor, Tensor], Tensor], x: list[Tensor], backward: bool) -> Callable[[], Any]:
    """A call, and with backward its gradients."""

    def job() -> None:
        with torch.set_grad_enabled(backward):
            out = attend(*x[:3])
        if backward:
            torch.autograd.grad(out, x[:3], x[3])

    return job


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's own, causal."""
    call = torch.nn.functional.scaled_dot_product_attention
    return call(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True).transpose(1, 2)


def ours(ring: Ring, layout: Layout, pattern: Pattern, kernel: str = "auto", transport: str = "auto") -> Callable[..., Tensor]:
    """ringctx's, of this ring's rank."""
    attention = Attention(pattern=pattern)
    return partial(ring_attention, ring=ring, layout=layout, attention=attention, kernel=kernel, transport=transport)  # type: ignore[return-value]


def rank_of(size: int, rank: int) -> Ring:
    """A rank to whom everything comes at once."""
    ring = Silent(members=tuple(range(size)), strict=False)
    ring.rank = rank
    return ring


def row(*cells: object) -> None:
    """One line of a table."""
    click.echo("| " + " | ".join(str(cell) for cell in cells) + " |")


def table(title: str, *heads: str) -> None:
    """Begin a table."""
    click.echo(f"\n## {title}\n")
    row(*heads)
    row(*("---" for _ in heads))


def ms(x: float) -> str:
    return f"{1000 * x:.2f}"


def flops(tokens: int, shape: Shape, backward: bool) -> float:
    """Of causal attention: 2 products forward, 5 more backward."""
    return tokens**2 * shape[0] * shape[2] * 2 * (3.5 if backward else 1.0)


def against_torch(shapes: list[Shape], lengths: list[int]) -> None:
    """A ring of one against torch's own attention."""
    names = [k.name for k in REGISTRY if k.name in ("flash", "sdpa", "triton")]
    table("A ring of one, causal, bfloat16; torch's scaled_dot_product_attention beside it", "h:g, d", "S", "way", "torch ms", "TFLOP/s",
          *(f"{n} ms, of torch" for n in names))  # fmt: skip
    for shape in shapes:
        for tokens in lengths:
            for backward in (False, True):
                x = tensors(tokens, shape, backward)
                call = Call("cuda", torch.bfloat16, *shape, shape[2], causal=True, backward=backward)
                takers = [k.name for k in REGISTRY if k.name in names and k.why_not(call) is None]
                layout = Layout.contiguous(tokens, 1)
                jobs = {n: once(ours(Ring.alone(), layout, p.causal(), n), x, backward) for n in takers}
                t = seconds({"torch": once(sdpa, x, backward), **jobs})
                cells = [f"{ms(t[n])}, {t['torch'] / t[n]:.2f}" if n in t else "-" for n in names]
                way = "forward + backward" if backward else "forward"
                row(f"{shape[0]}:{shape[1]}, {shape[2]}", f"{tokens:,}", way, ms(t["torch"]),
                    f"{flops(tokens, shape, backward) / t['torch'] / 1e12:.0f}", *cells)  # fmt: skip


def rank_of_many(shape: Shape, tokens: int, size: int, backward: bool) -> None:
    """One rank's share of a long sequence against 1/size of one call over a sequence that one GPU holds, scaled by its pairs."""
    held = 65_536
    x, y = tensors(tokens // size, shape, backward), tensors(held, shape, backward)
    layout = Layout.zigzag(tokens, size)
    jobs = {name: once(ours(rank_of(size, size // 2), layout, p.causal(), transport=name), x, backward) for name in ("rotate",)}
    t = seconds({"torch": once(sdpa, y, backward), **jobs}, rounds=3)
    fair = t["torch"] * (tokens / held) ** 2 / size
    for name in jobs:
        rate = flops(tokens, shape, backward) / size / t[name] / 1e12
        row(f"{tokens:,}", size, name, "forward + backward" if backward else "forward", ms(t[name]), f"{rate:.0f}", f"{fair / t[name]:.2f}")


def by_density(shape: Shape, tokens: int) -> None:
    """Time of sparse patterns against density times the time of the causal call."""
    patterns = {f"random blocks of 128, {share:.0%}": random_blocks(tokens, 128, share) for share in SHARES}
    patterns |= {
        "window 4,096": p.causal() & p.window(4096),
        "window 4,096 and 4 sinks": p.causal() & (p.window(4096) | p.sinks(4)),
        "16 documents": p.causal() & p.documents(cu_seqlens=list(range(0, tokens + 1, tokens // 16))),
    }
    layout = Layout.contiguous(tokens, 1)
    for backward in (False, True):
        x = tensors(tokens, shape, backward)
        jobs = {name: once(ours(Ring.alone(), layout, pattern), x, backward) for name, pattern in patterns.items()}
        t = seconds({"dense": once(ours(Ring.alone(), layout, p.causal()), x, backward), **jobs}, rounds=3)
        for name, pattern in patterns.items():
            share = density(pattern, tokens)
            way = "forward + backward" if backward else "forward"
            row(name, way, f"{share:.3f}", ms(t[name]), f"{t[name] / t['dense']:.3f}", f"{t[name] / t['dense'] / share:.2f}")


def density(pattern: Pattern, tokens: int) -> float:
    """Pairs that it shows over those that causality shows."""
    seen, step = 0, 1024
    keys = torch.arange(tokens, device="cuda")
    for a in range(0, tokens, step):
        seen += int(pattern.allows(keys[a : a + step], keys).sum())
    return seen / (tokens * (tokens + 1) / 2)


@click.command()
@click.option("--quick", is_flag=True, help="Short sequences only.")
@click.option("--only", type=click.Choice(["torch", "many", "sparse"]), multiple=True, help="These tables.")
def main(quick: bool, only: tuple[str, ...]) -> None:
    """Measure this GPU."""
    only = only or ("torch", "many", "sparse")
    click.echo(f"# {torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    if "torch" in only:
        against_torch([(8, 8, 64), (32, 8, 128)], [2_048, 16_384] if quick else [2_048, 8_192, 16_384, 65_536])
    if "many" in only:
        table("One rank of a ring, 32:8 heads of 128, causal, zigzag, messages at once; of torch = its time at S = 65,536, scaled",
              "S", "ranks", "transport", "way", "ms", "TFLOP/s", "of")  # fmt: skip
        for tokens, size in [(262_144, 8)] if quick else [(262_144, 8), (1_048_576, 8)]:
            for backward in (False, True):
                rank_of_many((32, 8, 128), tokens, size, backward)
    if "sparse" in only:
        table("Sparse patterns over 32,768 tokens, 8 heads of 64; dense = causal", "pattern", "way", "density", "ms", "of dense", "over it")
        by_density((8, 8, 64), 32_768)


if __name__ == "__main__":
    main()
