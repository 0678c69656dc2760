"""The pool itself: results in order, tracebacks with ranks, stacks of a hang, and work after each of them."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.pool import Fold, Pool, RankFailed, RanksHang


def _sum(ring: Any, x: int) -> tuple[int, int, float]:
    total = torch.tensor([float(x + ring.rank)])
    if ring.size > 1:
        dist.all_reduce(total, group=ring.group)
    return ring.rank, ring.size, float(total)


def _fail(ring: Any, culprit: int) -> None:
    if ring.rank == culprit:
        raise LookupError("a sentence")


def _hang(ring: Any) -> None:
    if ring.rank == 1:
        time.sleep(100)


def _die(ring: Any) -> None:
    if ring.rank == 1:
        os._exit(7)


def _shape(ring: Any) -> tuple[int, int, int, int]:
    return ring.rank, ring.size, ring.heads, ring.nodes


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_results_come_in_order(pool: Pool, size: int) -> None:
    assert pool.run(_sum, 10, size=size) == [(rank, size, 10.0 * size + size * (size - 1) / 2) for rank in range(size)]


@pytest.mark.parametrize("fold", [Fold(heads=2), Fold(nodes=2), Fold(heads=2, nodes=2)], ids=str)
def test_folded_rings(pool: Pool, fold: Fold) -> None:
    assert pool.run(_shape, size=4, fold=fold) == [(rank, 4, fold.heads, fold.nodes) for rank in range(4)]


def test_a_failure_names_its_rank(pool: Pool) -> None:
    with pytest.raises(RankFailed, match="rank 2 of 4 failed:(?s:.*)LookupError: a sentence") as caught:
        pool.run(_fail, 2, size=4)
    assert list(caught.value.errors) == [2] and isinstance(caught.value.errors[2], LookupError)
    assert pool.run(_sum, 0, size=4)[0][2] == 6.0


@pytest.mark.slow
def test_a_hang_shows_stacks_and_the_pool_recovers(pool: Pool) -> None:
    pool.run(_sum, 0, size=2)
    with pytest.raises(RanksHang, match=r"ranks \[1\] of 2 (?s:.*)stack of rank 1(?s:.*)in _hang"):
        pool.run(_hang, size=2, timeout=1.0)
    assert pool.run(_sum, 0, size=2)[1][2] == 1.0


@pytest.mark.slow
def test_a_dead_process_is_reported_and_the_pool_recovers(pool: Pool) -> None:
    with pytest.raises(RankFailed, match="exit code 7"):
        pool.run(_die, size=2)
    assert pool.run(_sum, 0, size=2)[1][2] == 1.0


@pytest.mark.slow
def test_the_pool_grows(pool: Pool) -> None:
    assert len(pool.run(_sum, 0, size=8)) == 8
    assert pool.run(_sum, 0, size=3)[2] == (2, 3, 3.0)
