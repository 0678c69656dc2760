"""Other libraries beside the ring: what is right is timed, what is wrong or breaks off is said, and what is missing is a sentence."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

from ringctx.core.layout import Layout
from ringctx.core.ring import Ring
from ringctx.errors import ConfigError
from ringctx.tools import bench
from ringctx.tools.bench import case
from ringctx.tools.bench.beside import Other
from ringctx.tools.bench.peers import Peer
from tests.pool import Pool

CASE = bench.Case(256, torch.bfloat16, "auto", d=32)


def rows(ring: Ring, names: tuple[str, ...]) -> bench.Row | None:
    torch.set_num_threads(1)
    return bench.measure(ring, CASE, 2, peers=[bench.peer(name) for name in names])


def test_torchs_own_context_parallelism_is_timed_beside_the_ring(pool: Pool) -> None:
    row, nothing = pool.run(rows, ("torch_context_parallel",), size=2)
    (beside,) = row.peers
    assert nothing is None and beside.refused is None and max(beside.error.values()) < 0.02
    assert beside.forward_ms > 0 and beside.backward_ms > 0 and beside.efficiency > 0
    text = bench.table([row])
    assert "beside it: torch_context_parallel" in text and f"{beside.efficiency:.2f}" in text
    assert bench.as_json([row])[0]["peers"][0]["name"] == "torch_context_parallel"


@pytest.mark.slow  # it compiles something of its own first
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_deepspeeds_ulysses_is_right(pool: Pool) -> None:
    row, _ = pool.run(rows, ("deepspeed_ulysses",), size=2, timeout=300.0)
    assert row.peers[0].refused is None and max(row.peers[0].error.values()) < 0.02


def alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Sees this rank's keys only: wrong."""
    return case.sdpa(q, k, v)


def broken(*_: Tensor) -> Tensor:
    raise NotImplementedError("no such kernel\non this device")


def others(ring: Ring, which: str) -> Any:
    attend = {"alone": alone, "broken": broken}[which]
    other = Other(Peer(which, "torch", "torch", Layout.contiguous, lambda group: attend), ring, CASE, torch.device("cpu"))
    other.round()
    return other.refused, other.beside(other.times, [(1.0, 1.0)])


@pytest.mark.parametrize("which, said", [("alone", "its answer is wrong"), ("broken", "NotImplementedError: no such kernel")])
def test_what_is_wrong_or_breaks_off_is_not_timed(pool: Pool, which: str, said: str) -> None:
    for refused, beside in pool.run(others, which, size=2):
        assert refused.endswith(said) or said in refused
        assert beside.refused == refused and beside.forward_ms is None and beside.efficiency is None


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="There is no peer 'nobody' to measure; there are deepspeed_ulysses, yunchang_ulysses"):
        bench.peer("nobody")
    if importlib.util.find_spec("yunchang") is None:
        with pytest.raises(ConfigError, match="yunchang_zigzag needs the package yunchang, which is not installed: pip install yunchang"):
            bench.peer("yunchang_zigzag")
    with pytest.raises(ConfigError, match="two ranks or more; add --ranks 2"):
        Other(bench.peer("torch_context_parallel"), Ring.alone(), CASE, torch.device("cpu"))
