"""Run by torchrun on 4 ranks: models spread over 2 x 2 ranks say what one process says, read and held by halves."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch.testing import assert_close

from ringctx import Attention, Layout, Ring, Unsupported
from ringctx.huggingface import shards, wrap
from ringctx.methods.scores import Alibi
from ringctx.runtime.cache import KVCache
from tests.tiny import tiny

IDS = torch.randint(3, 97, (1, 45), generator=torch.Generator().manual_seed(0))
READ, CPU = 41, torch.device("cpu")
PLANS = {"llama": 1, "qwen3": 1, "gemma3_text": 1, "mixtral": 1, "phi3": 2}
"""Families whose plans differ, and how many key heads a rank has; Phi-3's plan gives all heads to each rank of a row."""


def load(folder: Path, world: Ring, parts: int = 2) -> tuple[Any, Ring]:
    return shards.load(folder, world, parts, dtype=torch.float32, device=CPU)


@torch.no_grad()
def check(folder: Path, kind: str, world: Ring) -> None:
    """Prefill in chunks, then decode; every rank compares its own rows of the logits."""
    whole = tiny(kind)
    want = whole(IDS, use_cache=False).logits
    model, ring = load(folder / kind, world)
    assert (ring.size, ring.rank) == (2, world.rank // 2)
    assert shards.key_heads_of(model) == PLANS[kind]
    context, cache = wrap(model, ring), KVCache(4, ring.rank, ring.size, page=2)
    rows: list[tuple[torch.Tensor, torch.Tensor]] = []
    for begin, end in ((0, 30), (30, READ)):
        layout = Layout.zigzag(end - begin, 2).shifted(begin)
        cache.extend(layout)
        own = layout.indices(ring.rank)
        with context.running(layout, cache):
            rows.append((own, model(IDS[:, own], position_ids=own[None], use_cache=False).logits))
    for n in range(READ, IDS.shape[1]):
        cache.grow()
        with context.running(cache=cache, decoding=True):
            rows.append((torch.tensor([n]), model(IDS[:, n : n + 1], position_ids=torch.tensor([[n]]), use_cache=False).logits))
    for indices, got in rows:
        assert_close(got, want[:, indices], atol=1e-4 * float(want.abs().max()), rtol=0)
    held, all_there_are = (sum(local(p).numel() for p in m.parameters()) for m in (model, whole))
    assert held < 0.55 * all_there_are, (kind, held, all_there_are)


def local(weight: torch.Tensor) -> torch.Tensor:
    """What this rank holds of it."""
    return weight.to_local() if hasattr(weight, "to_local") else weight


def refused(folder: Path, world: Ring) -> None:
    """What goes by a head's number, and what has no plan."""
    model, ring = load(folder / "llama", world)
    for asked, named in ((Attention(scores=(Alibi.standard(4),)), "an additive score"), (Attention(sink=torch.zeros(4)), "a sink")):
        try:
            wrap(model, ring, asked)
        except Unsupported as refusal:
            assert f"was asked for {named}, which go by a head's number" in str(refusal), refusal
        else:
            sys.exit(f"{named} was taken")


def main() -> None:
    """argv: a folder with a checkpoint of each family."""
    torch.set_num_threads(1)
    with Ring.from_env(timeout=30) as world:
        for kind in PLANS:
            check(Path(sys.argv[1]), kind, world)
        refused(Path(sys.argv[1]), world)


if __name__ == "__main__":
    main()
