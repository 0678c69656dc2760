"""Sums of parts, in any order and of any tokens and heads, beside a tensor that all are added to."""

from __future__ import annotations

import pytest
import torch

from ringctx.core.sums import MOST_PIECES, Sum

N, HEADS = 40, 4


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("seed", range(24))
def test_parts_of_any_tokens_and_heads_add_up(seed: int, batch: int) -> None:
    make = torch.Generator().manual_seed(seed)
    like = torch.zeros(batch, N, HEADS, 3, dtype=torch.bfloat16)
    want, found = torch.zeros(like.shape), Sum(like)
    for _ in range(int(torch.randint(1, 9, (), generator=make))):
        a, b = sorted(torch.randint(N + 1, (2,), generator=make).tolist())
        heads = (None, (1, 2), (3, 0), tuple(range(HEADS)))[max(int(torch.randint(12, (), generator=make)) - 8, 0)]
        part = torch.randint(-8, 9, (batch, b - a, HEADS if heads is None else len(heads), 3), generator=make).float()
        part = part if bool(torch.randint(2, (), generator=make)) else part.bfloat16()  # exact in either
        want[:, a:b, list(heads or range(HEADS))] += part
        found.add(part, (a, b), heads)
        assert len(found._pieces) <= MOST_PIECES
    if seed % 2:
        assert torch.equal(found.wide(), want) and found.wide().is_contiguous()
    assert torch.equal(found.narrow(), want.bfloat16())
    assert not found.narrow().any()  # it began anew


def test_parts_that_share_no_tokens_are_taken_as_they_are() -> None:
    found, parts = Sum(torch.zeros(1, N, 2, 3)), [torch.randn(1, n, 2, 3) for n in (10, 30, 5)]
    found.add(parts[1], (10, 40))
    found.add(parts[0], (0, 10))
    assert [value.data_ptr() for _, _, value in found._pieces] == [parts[0].data_ptr(), parts[1].data_ptr()]
    whole = torch.cat(parts[:2], 1)
    found.add(parts[2], (8, 13))
    whole[:, 8:13] += parts[2]
    assert len(found._pieces) == 2 and torch.equal(found.wide(), whole)


def test_a_part_that_repeats_its_numbers_in_memory_is_not_written_over() -> None:
    found = Sum(torch.zeros(1, 4, 2, 3))
    found.add(torch.ones(1, 1, 1, 1).expand(1, 4, 2, 3))
    found.add(torch.ones(1, 2, 2, 3), (1, 3))
    assert found.narrow()[0, :, 0, 0].tolist() == [1, 2, 2, 1]
