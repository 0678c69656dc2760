"""ringctx eval --task heads on ranks: every head is judged as on one, wherever the keys lie."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from ringctx.config import parse
from ringctx.core.ring import Ring
from ringctx.runtime.answer import Listener
from ringctx.runtime.engine import Engine
from ringctx.tools.eval import heads

TEXT = " ".join(f"Verse {n} says that the number of waters is {n * n} and no more." for n in range(60))
RECALL = "cache.recall={block: 16, sinks: 20, recent: 30}"


def judged(ring: Ring, cache: Path, *settings: str) -> tuple[list[Any], int]:
    """Every head, what was chosen, and the bytes that were sent."""
    os.environ["XDG_CACHE_HOME"] = str(cache)
    config = heads.listening(parse("model: {path: random-tiny, dtype: float32, device: cpu}", [RECALL, *settings]))
    ours = Engine.load(config, ring)
    row, *means = heads.run(ours, TEXT, ("plain", "diary", "letter"), 900, 3, Listener())
    found = heads.judged(ours, [(means[0], means[1])])
    return [found, heads.best(found, 3), row.blocks, row.wordings, row.density], row.bytes


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    "settings",
    [
        ("layout.kind=zigzag",),
        ("layout={kind: striped, chunk: 150}",),
        ("layout={kind: contiguous, chunk: 200}", "attention.branches={kind: streaming, window: 64, sinks: 8}", "cache.storage=bf16"),
    ],
    ids=["zigzag", "striped", "streaming"],
)
def test_heads_are_judged_as_on_one_rank(pool, own_cache, size, settings):
    cache = Path(os.environ["XDG_CACHE_HOME"])
    want, nothing = judged(Ring.alone(), cache, *settings)
    for got, sent in pool.run(judged, cache, *settings, size=size):
        assert got == want
        assert sent > nothing == 0
