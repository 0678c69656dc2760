"""Greedy tokens over the ring against transformers' own `generate`, on real text. Not collected by pytest: minutes to hours.

    python -m tests.launch.parity reference TEXT OUT.pt --lengths 500 2000 7500       transformers' tokens and logits
    torchrun --nproc-per-node 2 -m tests.launch.parity ring TEXT OUT.pt               the ring's, compared

A token counts when transformers' gap between its two likeliest tokens exceeds twice the largest deviation of logits up to
the first token that differs; the others are listed.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from ringctx.cli import read_document
from ringctx.config import parse
from ringctx.core.ring import Ring
from ringctx.runtime.engine import Engine
from ringctx.runtime.sampling import Sampler
from ringctx.runtime.weights import checkpoint

CONFIG = "model: {path: smollm2-135m-instruct, dtype: %s, device: cpu}\ngeneration: {max_new_tokens: %d}"
QUESTION = "What does the text say? Answer in detail."


def pieces(engine: Engine, text: str, lengths: list[int]) -> list[str]:
    """Stretches of the text, one after another, of about these numbers of tokens each."""
    found, at = [], 0
    for length in lengths:
        tokens = engine.tokenizer(text[at : at + 8 * length]).input_ids[: length - 40]
        found.append(engine.tokenizer.decode(tokens))
        at += len(found[-1])
    return found


def reference(args: argparse.Namespace) -> None:
    """Write what transformers generates, with each step's logits."""
    from transformers import AutoModelForCausalLM

    engine = Engine.load(parse(CONFIG % (args.dtype, args.new)), Ring.alone())
    model = AutoModelForCausalLM.from_pretrained(checkpoint("smollm2-135m-instruct"), dtype=getattr(torch, args.dtype))
    cases: list[dict[str, Any]] = []
    for document in pieces(engine, read_document(args.text), args.lengths):
        prompt = torch.tensor([engine.prompt(document, QUESTION)])
        made = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=args.new,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens = made.sequences[0, prompt.shape[1] :].tolist()
        cases.append({"document": document, "prompt": prompt.shape[1], "tokens": tokens, "logits": torch.cat(made.logits).float()})
        print(f"{prompt.shape[1]} tokens: {engine.tokenizer.decode(tokens)!r}", flush=True)  # noqa: T201
    torch.save({"dtype": args.dtype, "new": args.new, "cases": cases}, args.out)


def ring(args: argparse.Namespace) -> None:
    """Run the same prompts over the ring and print, per prompt, the first token that differs, if any, and its gap."""
    saved = torch.load(args.out)
    rows: list[torch.Tensor] = []
    choose = Sampler.choose

    def recording(self: Sampler, logits: torch.Tensor) -> int:
        rows.append(logits.float())
        return choose(self, logits)

    Sampler.choose = recording  # type: ignore[method-assign]
    with Ring.from_env() as ranks:
        engine = Engine.load(parse(CONFIG % (saved["dtype"], saved["new"]), args.overrides), ranks)
        for case in saved["cases"]:
            rows.clear()
            began = time.perf_counter()
            answer = engine.generate(case["document"], QUESTION)
            if ranks.rank == 0:
                print(f"{ranks.size} ranks, {verdict(case, answer.tokens, rows)}, {time.perf_counter() - began:.1f} s", flush=True)  # noqa: T201


def verdict(case: dict[str, Any], tokens: list[int], rows: list[torch.Tensor]) -> str:
    """One line about one prompt."""
    want: list[int] = case["tokens"]
    same = next((n for n, (a, b) in enumerate(zip(tokens, want, strict=False)) if a != b), min(len(tokens), len(want)))
    upto = min(same + 1, len(rows), len(want))
    deviation = max(float((rows[n] - case["logits"][n]).abs().max()) for n in range(upto))
    gaps = case["logits"].topk(2).values.diff().abs().flatten()
    unsure = [n for n in range(len(want)) if gaps[n] <= 2 * deviation]
    ending = "all equal" if tokens == want else f"FIRST DIFFERENCE at {same} (gap {float(gaps[same]):.2e})"
    return f"{case['prompt']} tokens read, {len(want)} written: {ending}; logits deviate {deviation:.1e}, unsure {unsure}"


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["reference", "ring"])
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=[500, 700, 1000, 1500, 2000, 3000, 4000, 5000, 6000, 7500])
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    args = parser.parse_args()
    {"reference": reference, "ring": ring}[args.what](args)


if __name__ == "__main__":
    main()
