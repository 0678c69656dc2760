"""A seeded share of the exactness grid; `make exact` runs all of it.

RINGCTX_SHARE_SECONDS sets how long it may take (on two cores, 120 if absent), RINGCTX_SHARE_SEED which cases it draws.
"""

from __future__ import annotations

import os

import pytest

from tests.cases import Case
from tests.exact import judge, wrong
from tests.grid import grid, half, share
from tests.pool import Pool

SECONDS = float(os.environ.get("RINGCTX_SHARE_SECONDS", "120"))
SEED = int(os.environ.get("RINGCTX_SHARE_SEED", "0"))


@pytest.mark.parametrize("case", share((*half(), *grid()), SECONDS, SEED), ids=str)
def test_exact(pool: Pool, case: Case) -> None:
    assert not wrong(judge(pool, case))
