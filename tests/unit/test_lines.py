"""Lines: columns and diagonals. The audit of `judge` is in test_patterns."""

from __future__ import annotations

import itertools

import pytest
import torch

from ringctx.core.lines import Lines
from ringctx.core.pattern import EMPTY
from ringctx.errors import ConfigError

S = 12
INDEX = torch.arange(S)


def test_lines_are_columns_and_diagonals_widened_to_squares():
    for columns, offsets, tile in (((0, 3), (1, 4), 1), ((5,), (0, 6), 4), ((), (2,), 12)):
        want = torch.zeros(S, S, dtype=torch.bool)
        want[:, list(columns)] = True
        for i, other, offset in itertools.product(range(S), range(2 * S), offsets):
            if i // tile == other // tile and 0 <= other - offset < S:
                want[i, other - offset] = True
        assert torch.equal(Lines(columns, offsets, tile).allows(INDEX, INDEX), want)
    many = Lines(tuple(range(0, 10**6, 1000)), tuple(range(0, 10**6, 250)), 64)
    assert many.judge(range(900_000, 900_030), range(899_860, 899_870)) is EMPTY


def test_lines_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="Lines takes ascending numbers, each once, and was given 3 1"):
        Lines((3, 1), ())
    with pytest.raises(ConfigError, match="Lines was given a tile of 0"):
        Lines((), (0,), 0)
