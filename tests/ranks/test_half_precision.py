"""bf16 on rings of 1 to 8 against one call of torch's own kernel on the whole sequence, both against fp64."""

import pytest
import torch

from ringctx.core.ring import Ring
from ringctx.tools.bench import Case, accuracy
from tests.pool import Pool

FACTORS = {"out": 1.15, "dq": 1.1, "dk": 1.0, "dv": 1.0}
ROUNDING = 1.001  # the two differ by less where both do the same sums in another order


def on_rank(ring: Ring, case: Case) -> dict[str, dict[str, float]] | None:
    return accuracy(ring, case)


LENGTHS = [2048, pytest.param(8192, marks=pytest.mark.slow)]


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("key_heads", [8, 2])
@pytest.mark.parametrize("transport", ["rotate", "heads", "auto"])
@pytest.mark.parametrize("length", LENGTHS)
def test_a_ring_is_as_accurate_as_one_call(pool: Pool, length: int, transport: str, key_heads: int, size: int) -> None:
    errors = pool.run(on_rank, Case(length, torch.bfloat16, transport, g=key_heads), size=size, timeout=300.0)[0]
    for name, factor in FACTORS.items():
        assert errors["ring"][name] <= ROUNDING * factor * errors["one call"][name], (name, errors)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_precise_is_twice_as_accurate_in_dk_and_dv(pool: Pool, size: int) -> None:
    errors = pool.run(on_rank, Case(8192, torch.bfloat16, "rotate", kernel="precise"), size=size, timeout=300.0)[0]
    for name in ("dk", "dv"):
        assert 2 * errors["ring"][name] <= errors["one call"][name], (name, errors)
