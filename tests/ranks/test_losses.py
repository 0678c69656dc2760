"""Losses over several ranks are those of one: a token's label may live on another rank, and a rank may have no token at all."""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from ringctx.config import parse
from ringctx.core.ring import Ring
from ringctx.huggingface import wrap
from ringctx.runtime.engine import Engine, Listener
from ringctx.tools.eval import perplexity
from tests.tiny import tiny


def rows_on(ring: Ring, kind: str, length: int, settings: str) -> list[Any]:
    model = tiny(kind)
    engine = Engine(model, None, wrap(model, ring), parse(settings), torch.device("cpu"))
    tokens = torch.randint(3, 97, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    return perplexity.run(engine, tokens, Listener())


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
    assert all(len(astuple(row)) == 9 for row in want)
