"""Every method against its definition: forward and backward on 1 to 4 ranks, and read in chunks and token by token."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from ringctx import Ring
from ringctx.testing import error
from tests.methods import contract, listed
from tests.methods.contract import S, made, read, rows_read, trained
from tests.pool import Pool

NAMES = sorted(listed.METHODS)
SIZES = (1, 2, 3, 4)


@cache
def definition(name: str) -> Any:
    return made(name).reference()


def on_ranks(pool: Pool, job: Any, name: str, size: int) -> list[Any]:
    return pool.run(job, name, size=size) if size > 1 else [job(Ring.alone(), name)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_it_is_its_definition_forward_and_backward(pool: Pool, name: str, size: int) -> None:
    method, parts = made(name), on_ranks(pool, trained, name, size)
    out, slopes = definition(name)
    layout = method.layout(S, size)
    assert error(layout.unshard([part[0] for part in parts]), out) < 1e-12
    if method.untrained:
        return
    for token in method.tokens:
        found = layout.unshard([part[1][token] for part in parts])
        assert error(found, slopes[token]) < 1e-10 if slopes[token].any() else not found.any(), token
    for key in method.params:
        assert error(torch.stack([part[2][key] for part in parts]).sum(0), slopes[key]) < 1e-10, key


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", [name for name in NAMES if not made(name).unread])
def test_chunks_and_single_tokens_say_what_the_whole_says(pool: Pool, name: str, size: int) -> None:
    method, parts = made(name), on_ranks(pool, read, name, size)
    out, _ = definition(name)
    rows = rows_read(method, size)
    assert error(torch.cat([part[0] for part in parts], 1)[:, rows.argsort()], out[:, : S - contract.NEW]) < 1e-12
    for part in parts:
        assert error(torch.cat(part[1], 1), out[:, S - contract.NEW :]) < 1e-12
