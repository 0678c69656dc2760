"""Losses over several ranks are those of one: a token's label may live on another rank, and a rank may have no token at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from ringctx.config import parse
from ringctx.core.ring import Ring
from ringctx.huggingface import wrap
from ringctx.runtime.answer import Listener
from ringctx.runtime.engine import Engine
from ringctx.runtime.losses import token_losses
from ringctx.tools.eval import perplexity
from tests.unit.test_huggingface import tiny


def rows_on(ring: Ring, kind: str, length: int, settings: str) -> list[Any]:
    model = tiny(kind)
    engine = Engine(model, None, wrap(model, ring), parse(settings), torch.device("cpu"))
    tokens = torch.randint(3, 97, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    return perplexity.one_pass(engine, tokens, Listener())


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    ("kind", "length", "settings"),
    [
        ("llama", 201, ""),
        ("llama", 2, ""),
        ("gemma2", 130, "layout: {chunk: 32, kind: striped}"),
        ("llama", 97, "layout: {chunk: 48, kind: contiguous}"),  # the last chunk has one token
    ],
    ids=str,
)
def test_perplexity_rows_of_many_ranks_are_those_of_one(pool, size, kind, length, settings):
    want = rows_on(Ring.alone(), kind, length, settings)
    everyone = pool.run(rows_on, kind, length, settings, size=size)
    for rows in everyone:
        assert [(row.length, row.tokens, row.density) for row in rows] == [(row.length, row.tokens, row.density) for row in want]
        assert [row.nll for row in rows] == pytest.approx([row.nll for row in want], rel=2e-5)
        assert [row.nll for row in rows] == [row.nll for row in everyone[0]]
        assert rows[0].bytes == everyone[0][0].bytes > 0
        assert all(len(row.memory) == len(row.anonymous) == size for row in rows)


def row_through_windows(ring: Ring, length: int, stride: int, num_tokens: int) -> Any:
    model = tiny("llama")
    engine = Engine(model, None, wrap(model, ring), parse("layout: {chunk: 16}"), torch.device("cpu"))
    tokens = torch.randint(3, 97, (num_tokens,), generator=torch.Generator().manual_seed(1)).tolist()
    return perplexity.through_windows(engine, tokens, length, stride, Listener())


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("length", "stride", "num_tokens"), [(40, 11, 99), (2, 1, 5)])
def test_windows_of_many_ranks_are_those_of_one(pool, size, length, stride, num_tokens):
    want = row_through_windows(Ring.alone(), length, stride, num_tokens)
    everyone = pool.run(row_through_windows, length, stride, num_tokens, size=size)
    for row in everyone:
        assert row.nll == everyone[0].nll == pytest.approx(want.nll, rel=2e-5)
        assert (row.tokens, row.windows, row.bytes) == (num_tokens - 1, want.windows, everyone[0].bytes)


def losses_held_as(ring: Ring, chunk: int, length: int, kind: str, spill: str | None) -> tuple[list[int], list[float]]:
    model = tiny("llama")
    held = f"storage: {kind}, page: 16" + (f", spill: {spill}" if spill else "")
    engine = Engine(model, None, wrap(model, ring), parse(f"{{layout: {{chunk: {chunk}}}, cache: {{{held}}}}}"), torch.device("cpu"))
    tokens = torch.randint(3, 97, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    indices, losses = token_losses(engine, tokens)
    return indices.tolist(), losses.double().tolist()


def whole(pool: Any, *args: Any) -> torch.Tensor:
    """Every token's loss, whichever of 2 ranks it lives on."""
    found = {i: loss for indices, losses in pool.run(losses_held_as, *args, size=2) for i, loss in zip(indices, losses, strict=True)}
    return torch.tensor([found[i] for i in range(len(found))])


def test_later_chunks_read_their_keys_as_the_cache_holds_them(pool, tmp_path):
    chunk, length = 96, 288
    exact = whole(pool, chunk, length, "model", None)
    errors = {}
    for kind in ("int8", "int4"):
        got = whole(pool, chunk, length, kind, None)
        assert torch.equal(got[:chunk], exact[:chunk])  # the first chunk's keys are at hand, and not read back
        errors[kind] = float((got[chunk:] - exact[chunk:]).abs().mean())
        assert torch.equal(whole(pool, chunk, length, kind, str(tmp_path)), got)
    assert 1e-6 < errors["int8"] < errors["int4"] / 4
