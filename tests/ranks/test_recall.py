"""Recall on ranks: the same blocks and tokens as on one, wherever the keys lie, and no key is sent to find them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from ringctx.config import parse
from ringctx.core.ring import Ring
from ringctx.runtime.engine import Engine

DOCUMENT = "In the beginning God created the heaven and the earth. " * 8
RECALL = "cache.recall={{blocks: 3, block: 8, margin: 1, sinks: 3, recent: 9, heads: [[0, 0], [1, 2]], reread: {}}}"


def asked(ring: Ring, cache: Path, *settings: str) -> list[Any]:
    """Tokens of two answers, and the bytes of finding the blocks of the second."""
    os.environ["XDG_CACHE_HOME"] = str(cache)
    tiny = "model: {path: random-tiny, dtype: float32, device: cpu}"
    ours = Engine.load(parse(tiny, [*settings, "generation.max_new_tokens=6"]), ring)
    reading = ours.read(ours.prompts.opening(DOCUMENT))
    answers = [ours.answer(reading, ours.prompts.whole(DOCUMENT, question)) for question in ("Who?", "What was created?")]
    return [*(answer.tokens for answer in answers), answers[-1].bytes.get("recall", 0)]


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize(
    "setting", ["layout.kind=zigzag", "layout.chunk=100", "layout={kind: contiguous, chunk: 64}", "layout={kind: striped, chunk: 150}"]
)
@pytest.mark.parametrize("reread", ["true", "false"])
def test_answers_are_those_of_one_rank(pool, own_cache, size, setting, reread):
    cache = Path(os.environ["XDG_CACHE_HOME"])
    settings = (setting, RECALL.format(reread))
    *want, _ = asked(Ring.alone(), cache, *settings)
    for *tokens, sent in pool.run(asked, cache, *settings, size=size):
        assert tokens == want
        assert 0 < sent < size * (size - 1) * 4 * 2 * (64 + 20)  # a number a block, or a token, for each of two heads
