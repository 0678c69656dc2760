"""Monarch matrices: the product is the dense one, the approximation the best there is, and ranks multiply with two all-to-alls."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ringctx import Layout, Ring
from ringctx.errors import LayoutError
from ringctx.methods.monarch import approximate, dense, multiply, ring_multiply
from tests.pool import Pool


def factors_of(m: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(2, m, m, m, dtype=torch.float64, generator=generator)
    return left, right


def off(matrix: Tensor, approximation: Tensor) -> float:
    return float((matrix - approximation).norm() / matrix.norm())


def low_rank(matrix: Tensor, rank: int) -> Tensor:
    u, s, v = torch.linalg.svd(matrix)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


@pytest.mark.parametrize("m", [1, 2, 5])
def test_entries_are_the_definition_and_the_product_is_the_dense_one(m: int) -> None:
    left, right = factors = factors_of(m)
    matrix = dense(factors)
    for row in range(m * m):
        for column in range(m * m):
            (i, j), (k, l) = divmod(row, m), divmod(column, m)
            assert matrix[row, column] == left[j, i, k] * right[k, j, l]
    x = torch.randn(m * m, 3, dtype=torch.float64)
    assert_close(multiply(factors, x), matrix @ x, atol=1e-12, rtol=1e-12)


def test_the_approximation_is_the_nearest_and_beats_low_rank_where_the_matrix_is_local() -> None:
    n = torch.arange(64)
    band, identity = ((n[:, None] - n).abs() <= 3).double(), torch.eye(64, dtype=torch.float64)
    assert off(band, dense(approximate(band))) == pytest.approx(0.439, abs=5e-4)
    assert off(band, low_rank(band, 8)) == pytest.approx(0.528, abs=5e-4)  # as many numbers
    assert off(identity, dense(approximate(identity))) < 1e-12 and off(identity, low_rank(identity, 8)) == pytest.approx(0.935, abs=5e-4)
    monarch = dense(factors_of(8))
    assert off(monarch, dense(approximate(monarch))) < 1e-12
    left, right = approximate(band)
    best = off(band, dense((left, right)))
    for seed in range(20):
        a, b = (0.01 * x for x in factors_of(8, seed))
        assert off(band, dense((left + a, right + b))) > best


def test_shapes_that_are_no_monarch_matrix_are_refused() -> None:
    with pytest.raises(LayoutError, match="pad it to 16"):
        approximate(torch.ones(10, 10))
    with pytest.raises(LayoutError, match=r"these are \(2, 2, 2\) and \(3, 3, 3\)"):
        multiply((torch.ones(2, 2, 2), torch.ones(3, 3, 3)), torch.ones(4, 1))


def products(ring: Ring, m: int) -> tuple[Tensor, Tensor, list[Tensor], int]:
    """This rank's rows of M x and of dx, its share of the factors' gradients, and the bytes it sent forward."""
    factors = [x.requires_grad_() for x in factors_of(m)]
    layout = Layout.contiguous(m * m, ring.size)
    x, dout = (torch.sin(torch.arange(m * m * 3, dtype=torch.float64) * step).view(1, m * m, 3) for step in (0.7, 1.3))
    mine = layout.shard(x, ring.rank)[0].requires_grad_()
    ring.traffic.reset()
    out = ring_multiply((factors[0], factors[1]), mine, ring)
    sent = ring.traffic.sent["monarch"]
    out.backward(layout.shard(dout, ring.rank)[0])
    assert mine.grad is not None
    return out.detach(), mine.grad, [x.grad for x in factors if x.grad is not None], sent


@pytest.mark.parametrize(("size", "m"), [(1, 4), (2, 4), (2, 6), (3, 6), (4, 8)])
def test_ranks_multiply_as_one_does_forward_and_backward(pool: Pool, size: int, m: int) -> None:
    whole = products(Ring.alone(), m)
    parts = pool.run(products, m, size=size) if size > 1 else [whole]
    factors = factors_of(m)
    x = torch.sin(torch.arange(m * m * 3, dtype=torch.float64) * 0.7).view(m * m, 3)
    assert_close(torch.cat([part[0] for part in parts]), dense(factors) @ x, atol=1e-12, rtol=1e-12)
    assert_close(torch.cat([part[1] for part in parts]), whole[1], atol=1e-12, rtol=1e-12)
    for n in (0, 1):
        assert_close(torch.stack([part[2][n] for part in parts]).sum(0), whole[2][n], atol=1e-11, rtol=1e-12)
    if size > 1:  # twice all of its rows but those it keeps
        assert {part[3] for part in parts} == {2 * (m * m // size) * 3 * 8 * (size - 1) // size}


def refusal(ring: Ring) -> str:
    with pytest.raises(LayoutError) as refused:
        ring_multiply(factors_of(4), torch.ones(8, 1, dtype=torch.float64)[: 16 // ring.size], ring)
    return str(refused.value)


def test_ranks_that_do_not_divide_the_blocks_are_refused(pool: Pool) -> None:
    assert all("number of ranks that divides" in said or "m^2" in said for said in pool.run(refusal, size=3))
