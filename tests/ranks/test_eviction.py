"""Eviction on ranks: outputs and kept sets are those of the dense definition, on any number of ranks and in any layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from ringctx.config import parse
from tests import evicting, virtual
from tests.evicting import BATCH, KEY_HEADS, POLICIES, ROTARY, SCORED, by_definition, inputs, on_rank
from tests.pool import Pool


def check(ranks: list[Any], name: str, attention: Any, each_chunk: bool) -> None:
    out, kept = by_definition(POLICIES[name], attention, each_chunk)
    got = torch.full_like(inputs()[0], torch.nan)
    for outs, _, _ in ranks:
        for indices, part in outs:
            got[:, indices] = part
    assert_close(got, out, atol=1e-11, rtol=0)
    for b in range(BATCH):
        for g in range(KEY_HEADS):
            parts = [sets[b][g] for _, sets, _ in ranks]
            assert set().union(*parts) == kept[b][g]
            assert sum(map(len, parts)) == len(kept[b][g])


@pytest.mark.parametrize("each_chunk", [False, True], ids=["prompt", "chunks"])
@pytest.mark.parametrize(("size", "kind"), [(1, "zigzag"), (2, "striped"), (3, "zigzag"), (4, "contiguous")], ids=str)
@pytest.mark.parametrize("name", POLICIES)
def test_outputs_and_kept_keys_are_those_of_the_definition(name, size, kind, each_chunk):
    check(virtual.run(on_rank, POLICIES[name], ROTARY, kind, each_chunk, size=size), name, ROTARY, each_chunk)


@pytest.mark.parametrize("name", ["h2o", "snapkv", "duo"])
def test_scores_and_sinks_count_in_what_is_kept(name):
    check(virtual.run(on_rank, POLICIES[name], SCORED, "zigzag", True, size=3), name, SCORED, True)


@pytest.mark.parametrize("name", ["h2o", "snapkv", "duo"])
def test_ranks_without_tokens_take_part(name, monkeypatch):
    monkeypatch.setattr(evicting, "CHUNK", 3)
    check(virtual.run(on_rank, POLICIES[name], ROTARY, "contiguous", True, size=4), name, ROTARY, True)


def test_the_same_over_gloo(pool: Pool) -> None:
    check(pool.run(on_rank, POLICIES["h2o"], ROTARY, "zigzag", True, size=3), "h2o", ROTARY, True)


EVICT = {
    "streaming": "{kind: streaming, sinks: 2, recent: 20}",
    "streaming, chunks": "{kind: streaming, sinks: 2, recent: 20, each_chunk: true}",
    "duo": "{kind: duo, sinks: 2, recent: 20, streaming: ['0.0', '1.0']}",
    "h2o": "{kind: h2o, heavy: 16, recent: 16, each_chunk: true}",
    "snapkv": "{kind: snapkv, keys: 32, window: 8}",
    "pyramidkv": "{kind: pyramidkv, keys: 32, window: 8, beta: 3}",
}


def _answers(ring: Any) -> dict[str, list[int]]:
    from ringctx.runtime.engine import Engine

    said = {}
    for name, evict in EVICT.items():
        config = parse(
            f"model: {{path: random-tiny, dtype: float32, device: cpu}}\ncache: {{evict: {evict}, page: 8}}\n"
            "layout: {chunk: 50}\ngeneration: {max_new_tokens: 16}"
        )
        said[name] = Engine.load(config, ring).generate("In the beginning " * 6, "Who?").tokens
    return said


def test_a_model_says_the_same_on_one_rank_and_on_three(pool: Pool) -> None:
    pytest.importorskip("transformers")
    (alone,) = pool.run(_answers, size=1)
    assert pool.run(_answers, size=3) == [alone] * 3
    assert len({tuple(tokens) for tokens in alone.values()}) > 1
