"""Training on real ranks: gradients of all ranks average to those of one, and steps are the same on every rank."""

from __future__ import annotations

import pytest
from torch.testing import assert_close

pytest.importorskip("transformers")

from ringctx.core.ring import Ring
from tests.pool import Pool
from tests.training import gradients_of, steps_of


@pytest.mark.parametrize("carries", [False, True], ids=["plain", "selective"])
@pytest.mark.parametrize(("kind", "length"), [("zigzag", 37), ("contiguous", 24), ("contiguous", 2)])
def test_gradients_average_to_those_of_one_process(pool: Pool, kind: str, length: int, carries: bool) -> None:
    want = gradients_of(Ring.alone(), kind, length, carries)
    for size in (2, 4):  # the model's norms compute in fp32, where 2 times a gradient is exact and 3 times one is not
        totals = [sum(x) / size for x in zip(*pool.run(gradients_of, kind, length, carries, size=size), strict=True)]
        assert all(float((total - one).norm()) <= 1e-12 * max(float(one.norm()), 1e-3) for total, one in zip(totals, want, strict=True))


@pytest.mark.parametrize("carries", [False, True], ids=["plain", "selective"])
def test_steps_are_the_same_on_every_rank_and_as_on_one(pool: Pool, carries: bool) -> None:
    said, weights = steps_of(Ring.alone(), "zigzag", 37, carries)
    everyone = pool.run(steps_of, "zigzag", 37, carries, size=4)
    for theirs, of_theirs in everyone:
        assert_close(theirs, said, rtol=1e-10, atol=0)
        assert_close(of_theirs, weights, rtol=1e-7, atol=1e-9)
        assert all(bool((a == b).all()) for a, b in zip(of_theirs, everyone[0][1], strict=True))
    assert said[0][2] > 0.5  # so that clipping did something
