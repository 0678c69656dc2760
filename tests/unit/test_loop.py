"""Backward's two parts of home: all tiles, once, in the shares that are asked."""

from __future__ import annotations

import pytest
import torch

from ringctx import Layout
from ringctx.core import loop
from ringctx.core.loop import divided, early, least_tokens
from ringctx.core.pattern import CAUSAL
from ringctx.core.plan import make_plan
from ringctx.core.tiles import area
from ringctx.patterns import causal, full, window


def test_the_first_part_is_as_long_as_keys_are_to_all_that_travels():
    assert [early(item, wide, 1) for item, wide in ((2, 4), (4, 4), (8, 8))] == [1 / 3, 0.5, 0.5]
    assert early(2, 4, 4) == 2 / 3  # of gradients a quarter leaves last
    assert early(2, 4, 0) == 1 / 3  # nothing leaves


@pytest.mark.parametrize("share", [1 / 3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("pattern", [causal(), causal() & window(300), full()], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_home_is_divided_by_its_share_and_loses_nothing(layout, pattern, share):
    made = getattr(Layout, layout)(6000, 2)
    home = make_plan((pattern,), made, made, 1, "rotate").home
    marks = []
    for rows in zip(*divided(home, share), strict=True):
        count = torch.zeros(3000, 3000, dtype=torch.int8)
        for tile in (*rows[0], *rows[1]):
            verdict, a, b, c, d = tile
            count[a:b, c:d] += torch.ones(b - a, d - c, dtype=torch.int8).tril() if verdict == CAUSAL else 1
        marks.append(count)
        assert area(rows[0]) / sum(map(area, rows)) == pytest.approx(share, abs=0.1)
    whole = torch.zeros(3000, 3000, dtype=torch.int8)
    for verdict, a, b, c, d in home.tiles[0]:
        whole[a:b, c:d] += torch.ones(b - a, d - c, dtype=torch.int8).tril() if verdict == CAUSAL else 1
    assert torch.equal(marks[0], whole)


def test_the_first_part_is_never_empty():
    layout = Layout.contiguous(96, 2)
    home = make_plan((causal() & window(40),), layout, layout, 1, "rotate").home
    first, second = divided(home, 1 / 3)
    assert first == home.tiles and second == ((),)


def test_steps_are_counted_in_bytes_of_gradients(monkeypatch):
    monkeypatch.setattr(loop, "STEP_BYTES", 1000)
    assert [least_tokens(grads) for grads in (10, 7, 5000, 0)] == [100, 142, 1, 1000]
