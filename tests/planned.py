"""`python -m tests.planned [--only N …] [--rounds R]`: what `ringctx plan --device here` predicts beside what reading takes, as Markdown.

Of each case: one start of ranks that only plans, as the command does; one that loads and reads, whose bytes, hops and memory count; and in
this one, by turns, rounds of measuring the machine and of reading, since the machine's speed changes within minutes.
"""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from ringctx import Ring
from ringctx.config import Config, parse
from ringctx.device import peak_memory
from ringctx.huggingface import weights
from ringctx.runtime.engine import Engine
from ringctx.tools import planner, shapes
from tests.pool import Pool

SMOLLM2 = "smollm2-135m-instruct"
HEAD = """| | case | ranks | bytes of keys, planned and sent | hops | MB a rank, planned, taken | off | seconds, planned, taken | off |
|---|---|---|---|---|---|---|---|---|"""


@dataclass(frozen=True)
class Planned:
    """One case. more: keys of a configuration, as --set takes them."""

    model: str
    tokens: int
    ranks: int
    layout: str
    transport: str
    more: tuple[str, ...] = ()

    def config(self, folder: Path) -> Config:
        """Of a run; `wide` is a model in the folder."""
        path = folder / "wide" if self.model == "wide" else SMOLLM2
        said = [f"layout.kind={self.layout}", f"ring.transport={self.transport}", "ring.timeout=300", *self.more]
        return parse(f"model: {{path: '{path}', device: cpu}}", said)

    def __str__(self) -> str:
        more = ", ".join(one.removeprefix("attention.").removeprefix("model.") for one in self.more)
        return f"{self.model}, {self.tokens:,} tokens, {self.layout}, {self.transport}" + (f", {more}" if more else "")


S, W = "smollm2", "wide"
WINDOW, FP32 = "attention.window", "model.dtype=float32"
CASES = (
    Planned(S, 4096, 2, "zigzag", "rotate"),
    Planned(S, 8192, 2, "zigzag", "rotate"),
    Planned(S, 8192, 2, "contiguous", "fetch"),
    Planned(S, 8192, 2, "striped", "gather"),
    Planned(S, 8192, 2, "contiguous", "fetch", (f"{WINDOW}=1024",)),
    Planned(S, 8192, 2, "zigzag", "rotate", (f"{WINDOW}=1024", "attention.sinks=4")),
    Planned(S, 4096, 1, "contiguous", "rotate"),
    Planned(S, 8192, 4, "zigzag", "rotate"),
    Planned(S, 8192, 4, "contiguous", "rotate"),
    Planned(S, 16384, 4, "contiguous", "fetch", (f"{WINDOW}=2048",)),
    Planned(S, 8192, 2, "zigzag", "rotate", ("attention.pattern.kind=strided", "attention.pattern.length=128")),
    Planned(S, 16384, 2, "zigzag", "gather"),
    Planned(S, 4096, 2, "zigzag", "rotate", (FP32,)),
    Planned(S, 4096, 2, "contiguous", "fetch", (FP32, f"{WINDOW}=512")),
    Planned(S, 4096, 4, "striped", "rotate", (FP32,)),
    Planned(W, 16384, 2, "zigzag", "rotate"),
    Planned(W, 32768, 4, "zigzag", "fetch"),
    Planned(W, 32768, 2, "contiguous", "rotate", (f"{WINDOW}=4096",)),
    Planned(W, 8192, 1, "contiguous", "rotate", (FP32,)),
    Planned(W, 16384, 2, "striped", "rotate", ("attention.pattern.kind=atrous", "attention.pattern.rate=2")),
)
LONG = Planned(W, 131_072, 4, "zigzag", "rotate")
"""Number 0, which is not among all: for its memory."""


def planned(ring: Ring, case: Planned, folder: Path) -> dict[str, Any]:
    """What the command says of the case."""
    asked = case.config(folder)
    model = shapes.shapes_of(asked)
    run = planner.asked_here(asked, ring, case.tokens)
    options = planner.predict(model, list(shapes.by_layer(asked, model).values()), run).options
    one = next(one for one in options if (one.layout, one.transport) == (case.layout, case.transport))
    return {"bytes": one.bytes, "hops": one.hops, "memory": one.memory, "seconds": one.seconds}


def alone(ring: Ring, case: Planned, folder: Path) -> dict[str, Any]:
    """`planned`, by ranks that do nothing else, as the command's."""
    torch.set_num_threads(1)
    return planned(ring, case, folder)


def read(ring: Ring, case: Planned, folder: Path, rounds: int) -> dict[str, Any]:
    """What reading takes: bytes, hops and memory of the first time, and by turns what is planned and what it takes."""
    torch.set_num_threads(1)
    asked = case.config(folder)
    engine = Engine.load(asked, ring)
    tokens = [7919 * n % engine.model.config.vocab_size for n in range(case.tokens)]
    with ring.recorded() as timeline:
        first = engine.read(tokens).seconds
    sent, memory = engine.ring.traffic.sent["keys"], peak_memory(engine.device)
    hops = sum(one.kind == "keys" for one in timeline.journeys()) // (engine.num_layers - 1)
    seconds = [(planned(ring, case, folder)["seconds"]["total"], engine.read(tokens).seconds) for _ in range(rounds)]
    return {"bytes": sent, "hops": hops, "memory": memory, "first": first, "seconds": seconds}


def wide_model(folder: Path) -> None:
    """A checkpoint of 4 wider layers with random weights."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    small = weights.checkpoint("random-tiny")
    config = LlamaConfig(
        vocab_size=512, hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2,
        head_dim=128, max_position_embeddings=65536, bos_token_id=None, eos_token_id=0, pad_token_id=None,
    )  # fmt: skip
    weights.save(LlamaForCausalLM(config), folder)
    AutoTokenizer.from_pretrained(small).save_pretrained(folder)


def compared(case: Planned, folder: Path, rounds: int) -> tuple[list[str], float, float]:
    """The row's cells, and how far memory and seconds are off."""
    with Pool(ring_timeout=300.0, first=case.ranks) as pool:
        told = pool.run(alone, case, folder, size=case.ranks, timeout=600.0)[0]
    with Pool(ring_timeout=300.0, first=case.ranks) as pool:
        ranks = pool.run(read, case, folder, rounds, size=case.ranks, timeout=2400.0)
    pairs = [(a, max(rank["seconds"][n][1] for rank in ranks)) for n, (a, _) in enumerate(ranks[0]["seconds"])]
    pairs = pairs or [(told["seconds"]["total"], max(rank["first"] for rank in ranks))]
    memory, sent = max(rank["memory"] for rank in ranks), sum(rank["bytes"] for rank in ranks)
    off = told["memory"]["total"] / memory - 1
    late = statistics.median(a / b for a, b in pairs) - 1
    plan, took = (statistics.median(column) for column in zip(*pairs, strict=True))
    same = "=" if sent == told["bytes"] else f"{sent:,}"
    hops = max(rank["hops"] for rank in ranks)
    cells = [str(case), str(case.ranks), f"{told['bytes']:,} {same}", f"{told['hops']} {'=' if hops == told['hops'] else hops}"]
    cells += [f"{told['memory']['total'] / 1e6:,.0f} {memory / 1e6:,.0f}", f"{off:+.0%}", f"{plan:.2f} {took:.2f}", f"{late:+.0%}"]
    return cells, off, late


@click.command()
@click.option("--only", type=int, multiple=True, help="Numbers of cases; all by default.")
@click.option("--rounds", default=3, show_default=True, help="0: the first time is compared with what was planned before.")
def main(only: tuple[int, ...], rounds: int) -> None:
    """Compare."""
    with tempfile.TemporaryDirectory() as name:
        wide_model(Path(name) / "wide")
        weights.checkpoint(SMOLLM2)  # fetched before ranks start, as `plan` does: converting it takes memory
        click.echo(HEAD)
        offs = []
        for number, case in enumerate((LONG, *CASES)):
            if number not in (only or range(1, len(CASES) + 1)):
                continue
            cells, *off = compared(case, Path(name), rounds)
            offs.append(off)
            click.echo(f"| {number} | {' | '.join(cells)} |")
        within = [sum(abs(off[n]) <= most for off in offs) for n, most in ((0, 0.1), (1, 0.2))]
        click.echo(f"\nMemory within 10 % in {within[0]} of {len(offs)}, seconds within 20 % in {within[1]}.")


if __name__ == "__main__":
    main()
