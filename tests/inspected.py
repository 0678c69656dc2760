"""`ringctx inspect` on real weights against whole matrices: `python -m tests.inspected [--tokens N] [--ranks N]`.

The document is read once by ringctx over ranks, in float32, and once by transformers, whose attention gives its matrices. Of each measure
the largest difference over all heads is printed: relative for effective_count, which counts keys, absolute for the others. 1 where one
is above BAR.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from typing import Any

import torch
from torch import Tensor

from ringctx.cli import read_document
from ringctx.config import load
from ringctx.huggingface.weights import checkpoint
from ringctx.methods import sparsity
from ringctx.runtime.tokenise import tokenise
from ringctx.training.text import BOOK
from tests.launch.test_generate import ROOT

CONFIG = ROOT / "configs" / "smollm2_cpu.yaml"
BAR = 1e-5
ROWS, FIRST = 512, 4


def by_ringctx(tokens: int, ranks: int) -> list[dict[str, Any]]:
    """The heads of inspect.json."""
    with tempfile.TemporaryDirectory() as folder:
        asked = ["--document", str(ROOT / BOOK), "--tokens", str(tokens), "--rows", str(ROWS), "--selector", "none", "--ranks", str(ranks)]
        command = [sys.executable, "-m", "ringctx", "inspect", str(CONFIG), *asked, "--set", "model.dtype=float32", "--json"]
        done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, check=True, text=True)
    heads: list[dict[str, Any]] = json.loads(done.stdout)["heads"]
    return heads


def by_matrices(tokens: int) -> list[dict[str, Any]]:
    """The same of every head, from transformers' matrices, a layer at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = checkpoint(load(CONFIG).model.path)
    model: Any = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32)
    ids = tokenise(AutoTokenizer.from_pretrained(path), read_document(ROOT / BOOK)[: 16 * tokens])[:tokens]
    found: list[dict[str, Any]] = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda module, given, output: found.extend(_heads(output[1][0])))
    with torch.no_grad():
        model.model(torch.tensor([ids]), use_cache=False)
    return found


def _heads(p: Tensor) -> list[dict[str, Any]]:
    """p: (h S S) of a layer. The rows that `inspect` takes, and its measures of them."""
    length = p.shape[-1]
    rows = torch.linspace(1, length - 1, min(ROWS, length - 1)).round().long().unique()
    p, seen = p[:, rows].double(), rows + 1
    far = rows[:, None] - torch.arange(length)
    edges = [0, *(2**n for n in range((length - 1).bit_length()))]
    bins = torch.bucketize(far.clamp(min=0), torch.tensor(edges), right=True) - 1
    distance = torch.stack([p.where(bins == n, 0.0).sum(-1).mean(-1) for n in range(len(edges))], -1)
    entropy = sparsity.entropy(p)
    hoyer = torch.stack([sparsity.hoyer(p[:, n, :count]) for n, count in enumerate(seen.tolist())], -1)
    each = {
        "entropy": entropy, "relative_entropy": entropy / seen.log(), "effective_count": sparsity.effective_count(p), "hoyer": hoyer,
        "largest": p.amax(-1), "first": p[..., :FIRST].sum(-1),
    }  # fmt: skip
    means = {name: values.mean(-1).tolist() for name, values in each.items()}
    return [{name: values[head] for name, values in means.items()} | {"distance": distance[head].tolist()} for head in range(len(p))]


def differences(seen: list[dict[str, Any]], want: list[dict[str, Any]]) -> dict[str, float]:
    """The largest over heads."""
    found = {}
    for name in want[0]:
        a, b = (torch.tensor([head[name] for head in heads], dtype=torch.float64) for heads in (seen, want))
        found[name] = float(((a - b) / (b if name == "effective_count" else 1)).abs().max())
    return found


def main() -> int:
    """Compare, and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--ranks", type=int, default=2)
    given = parser.parse_args()
    want = by_matrices(given.tokens)
    found = differences(by_ringctx(given.tokens, given.ranks), want)
    print(f"{given.tokens} tokens on {given.ranks} ranks, {len(want)} heads, the largest differences:")
    print("\n".join(f"{name:18s}{value:.1e}" for name, value in found.items()))
    return int(max(found.values()) > BAR)


if __name__ == "__main__":
    sys.exit(main())
