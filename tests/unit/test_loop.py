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
    assert [early(dtype, 1) for dtype in (torch.bfloat16, torch.float32, torch.float64)] == [1 / 3, 0.5, 0.5]
    assert early(torch.bfloat16, 4) == 2 / 3  # of gradients a quarter leaves last


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
    k, v = torch.empty(2, 10, 3, 16, dtype=torch.bfloat16), torch.empty(2, 10, 3, 8, dtype=torch.bfloat16)
    monkeypatch.setattr(loop, "STEP_BYTES", 100 * 2 * 3 * (16 + 8) * 4)
    assert least_tokens(k, v) == 100
    assert least_tokens(k[:0], v[:0]) > 0  # no batch row: nothing travels
