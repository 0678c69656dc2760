"""Families over ranks: prefill at once or in chunks, then decode, say what transformers' own eager attention says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("transformers")

from ringctx.huggingface import wrap
from ringctx.runtime.cache import KVCache
from tests.pool import Pool
from tests.reading import read_and_write
from tests.tiny import tiny

KINDS = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "gpt_oss", "phi3", "olmo3", "exaone4"]
IDS = torch.randint(3, 97, (1, 55), generator=torch.Generator().manual_seed(0))
READ, WRITTEN = 48, 7
"""Tokens of the prefill, and those that are decoded one by one."""


def _run(ring: Any, kind: str, chunk: int, read: int) -> Any:
    """The logits of this rank's tokens with their indices, those of the prefill first, then those that every rank decodes."""
    model = tiny(kind)
    cache = KVCache(4, ring.rank, ring.size, page=2)
    indices, logits = zip(*read_and_write(model, wrap(model, ring), cache, IDS[:, : read + WRITTEN], read, chunk), strict=True)
    return torch.cat(indices), torch.cat(logits, 1)


def _check(pool: Pool, kind: str, size: int, chunk: int, read: int) -> None:
    with torch.no_grad():
        want = tiny(kind)(IDS, use_cache=False).logits
    seen = set()
    for indices, logits in pool.run(_run, kind, chunk, read, size=size):
        assert_close(logits, want[:, indices], atol=1e-4 * float(want.abs().max()), rtol=0)
        seen |= set(indices.tolist())
    assert seen == set(range(read + WRITTEN))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_at_once_and_an_answer_say_what_eager_attention_says(pool: Pool, kind: str, size: int) -> None:
    _check(pool, kind, size, READ, READ)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_in_chunks_and_an_answer_say_what_eager_attention_says(pool: Pool, kind: str) -> None:
    _check(pool, kind, 3, 20, READ)


@pytest.mark.parametrize("kind", ["gemma3_text", "gpt_oss"])
def test_ranks_without_tokens_of_the_prompt_decode_like_the_others(pool: Pool, kind: str) -> None:
    _check(pool, kind, 4, 2, 2)
