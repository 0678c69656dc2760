"""The pool itself: results in order, tracebacks with ranks, stacks of a hang, and work after each of them."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ringctx import Ring
from ringctx.core.ring import Message
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


def _half_done(ring: Any) -> None:
    """Rank 0 waits for what nobody sends; rank 1 fails with a message under way."""
    if ring.rank == 0:
        ring.exchange("keys", "keys at hop 1", [Message(1, (torch.empty(5),)), Message(1, (torch.empty(3),))]).wait()
    ring.exchange("keys", "keys at hop 1", [], [Message(0, (torch.ones(5),))])
    raise LookupError("in the middle")


@pytest.mark.slow
def test_messages_of_a_failed_job_are_not_received_later(pool: Pool) -> None:
    with pytest.raises((RankFailed, RanksHang), match="in the middle"):
        pool.run(_half_done, size=2)
    assert pool.run(_sum, 0, size=2)[0][2] == 1.0


def _of_mesh(ring: Any) -> list[tuple[int, int, int, int]]:
    """Rings along the axes of a mesh, made by all ranks together; each then sends a number round."""
    mesh = DeviceMesh("cpu", torch.arange(ring.size).view(2, ring.size // 4, 2), mesh_dim_names=("node", "ring", "heads"))
    whole = Ring.from_mesh(mesh, ring="ring", heads="heads", node="node", timeout=20.0)
    pair = Ring.from_mesh(mesh, ring="heads", timeout=20.0)
    for made in (whole, pair):
        came = torch.empty(1)
        left, right = (made.rank - 1) % made.size, (made.rank + 1) % made.size
        made.exchange("keys", "keys at hop 1", [Message(left, (came,))], [Message(right, (torch.tensor([float(made.rank)]),))]).wait()
        assert int(came) == left
    return [(made.rank, made.size, made.heads, made.nodes) for made in (whole, pair)]


def test_rings_of_a_mesh(pool: Pool) -> None:
    pool.run(_sum, 0, size=3)  # ranks that have made different numbers of groups
    size = pool.world
    assert pool.run(_of_mesh, size=size, timeout=30) == [[(rank, size, 2, 2), (rank % 2, 2, 1, 1)] for rank in range(size)]


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
