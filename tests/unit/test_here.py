"""`ringctx plan --device here`: what a visit takes and what ranks that share cores take, by hand; and one rank of this machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ringctx import Attention, Layout, Ring, cli
from ringctx.core.pattern import FULL, PARTIAL
from ringctx.core.plan import Visit, make_plan
from ringctx.patterns import causal, dilated
from ringctx.patterns import window as window_of
from ringctx.tools.planner import Here
from ringctx.tools.planner.here import DEEP, FEW, fitted
from ringctx.tools.planner.machine import Device, Effort
from ringctx.tools.shapes import Shapes

NOTHING = Effort(0, 0, 0, 0, 0)
SMALL = Shapes(layers=3, hidden=64, heads=4, key_heads=2, width=16, intermediate=128, vocabulary=100)


def device(**more: object) -> Device:
    given = {"name": "", "memory": 1e9, "attention": NOTHING, "linear": 1e9} | more
    return Device(**given)  # type: ignore[arg-type]


def test_a_visit_is_calls_and_products_and_what_is_touched() -> None:
    tiles = ((FULL, 0, 64, 0, 32), (FULL, 64, 128, 32, 64), (PARTIAL, 0, 10, 64, 96)), ((PARTIAL, 0, 10, 64, 96),), ()
    visit = Visit(0, (range(96),), ((0, 96),), tiles)  # type: ignore[arg-type]
    plain, masked = 2 * 64 * 32, 10 * 32
    some = (dilated(2), dilated(2), causal())
    each = device().effort(visit, some, (3, 1, 5), 8, (range(128),))
    assert each == (1, 4, 4 * 8 * 3 * plain, 4 * 8 * (3 + 1) * masked, 8 * (3 * (128 + 96) + 1 * (10 + 32)))
    assert device(edge=32).effort(visit, some, (3, 1, 5), 8, (range(128),)) == each._replace(calls=3)  # both whole ones are one call
    window, band = ((PARTIAL, 0, 128, 0, 128),), (causal() & window_of(100),)
    found = device(edge=32).effort(Visit(0, (range(128),), ((0, 128),), (window,)), band, (1,), 1, (range(128),))  # type: ignore[arg-type]
    assert found == (1, 1, 4 * 32 * (32 + 64 + 96 + 128), 0, 256)  # of a square that a border cuts all
    assert device(attention=Effort(1, 10, 0, 0, 100)).seconds(Effort(1, 2, 3, 4, 5)) == 1 + 20 + 500
    assert device().effort(Visit(0, (), (), ((),)), (causal(),), (1,), 8, (range(128),)) == NOTHING  # type: ignore[arg-type]


def test_ranks_that_share_cores_end_one_after_another() -> None:
    assert device().shared([3.0, 1.0]) == 3.0
    both = device(slow=(0.5, 1.0))  # alone each is twice as quick
    assert both.shared([1.0, 3.0]) == pytest.approx(1.0 + 2.0 * 0.5)
    assert both.shared([2.0, 2.0]) == pytest.approx(2.0)
    assert device(slow=(0.25, 0.5, 1.0)).shared([1.0, 2.0, 4.0]) == pytest.approx(1.0 + 0.5 + 2 * 0.25)


def test_a_fit_finds_what_seconds_are_made_of_and_nothing_below_0() -> None:
    make = torch.Generator().manual_seed(0)
    efforts = torch.rand(9, 4, generator=make) * torch.tensor([1.0, 1e3, 1e9, 1.0])
    seconds = efforts @ torch.tensor([2e-3, 1e-5, 3e-12, 0.0])
    found = fitted(efforts.tolist(), seconds.tolist())
    assert found == pytest.approx([2e-3, 1e-5, 3e-12, 0.0], rel=1e-3, abs=1e-9)
    efforts[:, 1] = 0.0
    assert fitted(efforts.tolist(), (efforts @ torch.tensor([2e-3, 1e-5, 3e-12, -1e-4])).tolist())[1] == 0.0
    assert min(fitted([[1.0, 1.0], [1.0, 2.0]], [2.0, 1.0])) == 0.0


def test_one_rank_of_this_machine_is_measured() -> None:
    found, link = Here(Ring.alone(), SMALL, torch.device("cpu"), torch.float32).measure([Attention(), Attention(causal())], 600)
    assert found.linear > 0 and found.base > 1e7 and found.item == 4 and found.slow == (1.0,)
    assert min(found.attention) >= 0 and found.attention.plain + found.attention.calls > 0
    assert link.seconds(1e6) < 1e-3  # nothing is sent
    plan = make_plan((causal(),), Layout.zigzag(600, 1), Layout.zigzag(600, 1), 0, "rotate")
    assert 1e-6 < found.seconds(found.effort(plan.home, (causal(),), (4,), 16, (range(600),))) < 1.0


@pytest.mark.parametrize("tokens", [DEEP - 1, DEEP])
def test_queries_after_many_keys_are_measured_where_there_are_as_many(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    measured, attends = [], Here._attends

    def spy(self: Here, attention: Attention, layout: Layout) -> Callable[[], object]:
        measured.append((layout.count(0), self._keys_of(layout).count(0)))
        return attends(self, attention, layout)

    monkeypatch.setattr(Here, "_attends", spy)
    Here(Ring.alone(), SMALL, torch.device("cpu"), torch.float32).measure([], tokens)
    assert ((FEW, DEEP) in measured) == (tokens == DEEP)
    assert {(2048, 2048), (4096, 4096)} < set(measured)


def test_the_command_plans_for_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text("model: {path: random-tiny, device: cpu, dtype: float32}")
    assert cli.main(["plan", str(tmp_path / "c.yaml"), "--seq-len", "500", "--device", "here", "--ranks", "1", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {"ranks", "layout", "transport", "bytes", "hops", "memory", "imbalance", "seconds", "why"} == set(told)
    assert (told["ranks"], told["bytes"], told["hops"]) == (1, 0, 0) and 0 < told["seconds"]["total"] < 60
    assert told["memory"]["base"] > 1e7
