"""A wrapped model with branches on several ranks, its prompt read in chunks, says what the definition says on one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

pytest.importorskip("transformers")

from ringctx.core.layout import Layout
from ringctx.core.ring import Ring
from ringctx.huggingface import wrap
from ringctx.runtime.cache import KVCache
from tests.pool import Pool
from tests.unit.test_branches_model import asked, by_definition
from tests.unit.test_huggingface import IDS, POSITIONS, tiny

CHUNKS = ((0, 23), (23, 17))


@torch.no_grad()
def said(ring: Ring, kind: str) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """This rank's indices and logits of each chunk, and the logits of ten tokens that are decoded."""
    model: Any = tiny()
    context, cache, parts = wrap(model, ring, asked(kind)), KVCache(4, ring.rank, ring.size, page=2), []
    for begin, length in CHUNKS:
        layout = Layout.zigzag(length, ring.size).shifted(begin)
        indices = layout.indices(ring.rank)
        cache.extend(layout)
        with context.running(layout, cache):
            parts.append((indices, model(IDS[:1, indices], position_ids=indices[None], use_cache=False).logits[0]))
    new = []
    for n in range(40, 50):
        cache.grow()
        with context.running(cache=cache, decoding=True):
            new.append(model(IDS[:1, n : n + 1], position_ids=POSITIONS[:, n : n + 1], use_cache=False).logits[0])
    return parts, torch.cat(new)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("kind", ["self_extend", "streaming", "dual_chunk"])
def test_chunks_and_decode_over_ranks_say_what_the_definition_says(pool: Pool, kind: str, size: int) -> None:
    want = by_definition(tiny(), asked(kind))[0]
    everyone = pool.run(said, kind, size=size)
    got = torch.empty_like(want)
    for parts, new in everyone:
        for indices, part in parts:
            got[indices] = part
        got[40:] = new
        assert torch.equal(new, everyone[0][1])
    assert_close(got, want, atol=2e-5 * float(want.abs().max()), rtol=0)
