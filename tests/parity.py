"""`make parity`: greedy tokens of the main job on 1 to 4 ranks against transformers' own generate, on real weights and text.

Ten prompts of 500 to 7,500 tokens, 64 new tokens each. A token counts where transformers' two best logits are further apart
than twice the largest deviation of our logits from its own in that answer; the others are listed. Resumable: what is in the
folder .parity is not computed again. In another dtype than fp32 the first divergence and its gap are reported instead.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ringctx import Ring
from ringctx.config import load
from ringctx.runtime.engine import Engine
from tests import embedded

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".parity"
CONFIG = ROOT / "configs" / "smollm2_cpu.yaml"
BOOK = ROOT / "launch" / "documents" / "kjv.txt.gz"
NEW_TOKENS = 64
LENGTHS = [500 + (7500 - 500) * n // 9 for n in range(10)]


def engine_of(ring: Ring, dtype: str, overrides: Sequence[str] = ()) -> Engine:
    """The main job's engine, which never ends a text before its time."""
    engine = Engine.load(load(CONFIG, (f"model.dtype={dtype}", f"generation.max_new_tokens={NEW_TOKENS}", *overrides)), ring)
    engine.model.generation_config.eos_token_id = -1
    return engine


def prompts(engine: Engine, lengths: list[int]) -> list[list[int]]:
    """Prompt n begins at another place of the book, and has exactly its number of tokens."""
    with gzip.open(BOOK, "rt") as book:
        text = book.read()
    step = len(text) // (len(LENGTHS) + 1)
    return [engine.tokenizer(text[step * LENGTHS.index(n) :][: 8 * n]).input_ids[:n] for n in lengths]


def reference(dtype: str, lengths: list[int]) -> None:
    """Tokens and logits of transformers' own generate, one file a prompt."""
    missing = [n for n in lengths if not (FOLDER / f"{dtype}-{n}.pt").exists()]
    if not missing:
        return
    from transformers import AutoModelForCausalLM

    from ringctx.huggingface.weights import checkpoint

    engine = engine_of(Ring.alone(), dtype)
    model = AutoModelForCausalLM.from_pretrained(checkpoint(engine.config.model.path), dtype=getattr(torch, dtype)).eval()
    for n, prompt in zip(missing, prompts(engine, missing), strict=True):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            said = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=-1,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
        logits = torch.stack([x[0].float() for x in said.logits])
        torch.save({"tokens": said.sequences[0, n:], "logits": logits}, FOLDER / f"{dtype}-{n}.pt")
        print(f"transformers, {dtype}, {n} tokens: done", flush=True)


def ours(dtype: str, lengths: list[int], overrides: list[str]) -> None:
    """Run on the ranks that torchrun started; rank 0 appends one line a prompt to the results."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("WORLD_SIZE", "1"))))
    with Ring.from_env(timeout=300) as ring:
        engine = engine_of(ring, dtype, overrides)
        for n, prompt in zip(lengths, prompts(engine, lengths), strict=True):
            tokens, logits = _recorded(engine, prompt)
            if ring.rank == 0:
                row = compare(dtype, n, ring.size, tokens, logits) | {"set": overrides}
                with (FOLDER / "results.jsonl").open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)


def _recorded(engine: Engine, prompt: list[int]) -> tuple[Tensor, Tensor]:
    kept: list[Tensor] = []
    rest, step = engine._rest, engine._step

    def keeping(act: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def kept_too(*arguments: Any) -> Tensor:
            logits = act(*arguments)
            kept.append(logits[0, -1].float())
            return logits

        return kept_too

    engine._rest, engine._step = keeping(rest), keeping(step)  # type: ignore[method-assign]
    try:
        answer = engine.complete(prompt, num_read=len(prompt) // 2)
    finally:
        engine._rest, engine._step = rest, step  # type: ignore[method-assign]
    return torch.tensor(answer.tokens), torch.stack(kept)


def compare(dtype: str, length: int, ranks: int, tokens: Tensor, logits: Tensor) -> dict[str, Any]:
    """How far our answer is from transformers': up to the first difference, since the texts part there."""
    theirs = torch.load(FOLDER / f"{dtype}-{length}.pt")
    differ = (tokens != theirs["tokens"]).nonzero().flatten()
    first = int(differ[0]) if len(differ) else None
    upto = len(tokens) if first is None else first + 1
    deviation = float((logits[:upto] - theirs["logits"][:upto]).abs().max())
    best = theirs["logits"][:upto].topk(2).values
    gap = best[:, 0] - best[:, 1]
    unsure = (gap <= 2 * deviation).nonzero().flatten().tolist()
    return {
        "dtype": dtype,
        "length": length,
        "ranks": ranks,
        "equal": first is None,
        "first_difference": first,
        "gap_there": None if first is None else float(gap[first]),
        "deviation": deviation,
        "smallest_gap": float(gap.min()),
        "not_counted": unsure,
        "holds": first is None or first in unsure,
    }


def results() -> list[dict[str, Any]]:
    """What has been measured so far."""
    path = FOLDER / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> int:
    """Compute what is missing, print the table; 1 if a token that counts differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 3, 4])
    parser.add_argument("--lengths", type=int, nargs="*", default=LENGTHS)
    parser.add_argument(
        "--set", action="append", default=[], help="a key of the configuration, such as cache.spill=FOLDER; may be repeated"
    )
    parser.add_argument("--training", action="store_true", help="instead: steps of training with every engine (tests/embedded.py)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    if given.training:
        return embedded.grid(FOLDER / "training")
    if given.worker:
        ours(given.dtype, given.lengths, given.set)
        return 0
    torch.set_num_threads(os.cpu_count() or 1)
    reference(given.dtype, given.lengths)
    asked = lambda row: row["dtype"] == given.dtype and row["set"] == given.set
    for ranks in given.ranks:
        done = {r["length"] for r in results() if r["ranks"] == ranks and asked(r)}
        missing = [str(n) for n in given.lengths if n not in done]
        if missing:
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", "tests.parity"]
            threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks))}
            subprocess.run(
                [*launcher, "--worker", "--dtype", given.dtype, "--lengths", *missing, *(f"--set={one}" for one in given.set)],
                check=True,
                cwd=ROOT,
                env=os.environ | threads,
            )
    rows = sorted(filter(asked, results()), key=lambda r: (r["ranks"], r["length"]))
    for r in rows:
        verdict = "equal" if r["equal"] else f"differs at token {r['first_difference']} (gap {r['gap_there']:.2e})"
        counted = f", not counted {r['not_counted']}" if r["not_counted"] else ""
        near = f"logits within {r['deviation']:.1e}, smallest gap {r['smallest_gap']:.1e}"
        print(f"{r['ranks']} ranks, {r['length']} tokens: {verdict}; {near}{counted}")
    return 0 if given.dtype != "float32" or all(r["holds"] for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
