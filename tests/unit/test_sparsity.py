"""Measures of sparsity: their goldens, and the ends of their ranges."""

from __future__ import annotations

import math

import pytest
import torch

from ringctx.methods import sparsity

ROWS = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.5, 0.5, 0, 0], [0.25] * 4, [1, 0, 0, 0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("measure", "want"),
    [
        (sparsity.spread, [0.693375, 0.707107, 1, 0.5]), (sparsity.hoyer, [0.613249, 0.585786, 0, 1]),
        (sparsity.entropy, [0.940448, 0.693147, 1.386294, 0]), (sparsity.renyi2, [0.653926, 0.693147, 1.386294, 0]),
        (sparsity.effective_count, [1.923077, 2, 4, 1]), (sparsity.zeros, [0, 0.5, 0, 0.75]),
        (lambda x: sparsity.zeros(x, 0.1), [0.75, 0.5, 0, 0.75]),
    ],
    ids=["spread", "hoyer", "entropy", "renyi2", "effective_count", "zeros", "epsilon_zeros"],
)  # fmt: skip
def test_goldens(measure, want):
    assert measure(ROWS).tolist() == pytest.approx(want, abs=1e-6)


def test_a_signed_vector_counts_by_size_and_a_scaled_one_as_before():
    x = torch.tensor([3.0, -4.0, 0.0, 0.0], dtype=torch.float64)
    assert float(sparsity.spread(x)) == pytest.approx(7 / (2 * 5)) and float(sparsity.hoyer(x)) == pytest.approx(2 - 7 / 5)
    assert float(sparsity.hoyer(100 * x)) == pytest.approx(float(sparsity.hoyer(x)))
    p = torch.full((1024,), 1 / 1024, dtype=torch.float64)
    assert float(sparsity.entropy(p)) == pytest.approx(math.log(1024))
