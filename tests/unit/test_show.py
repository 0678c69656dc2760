"""`ringctx show`: the page says what the plans say, and the timelines of ranks lie over each other."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("transformers")

from ringctx import cli
from ringctx.config import parse
from ringctx.core.pattern import CAUSAL, EMPTY, FULL, PARTIAL
from ringctx.core.timeline import Span, Timeline
from ringctx.tools import show
from ringctx.tools.show.timelines import merged, ranks, save

SCRATCH = "training: {scratch: {layers: 3, hidden: 64, heads: 4, key_heads: 2, intermediate: 64, vocabulary: 50}, context: 64}"


def config(attention: str = "{}") -> str:
    return f"model: {{dtype: float32, device: cpu}}\nattention: {attention}\n{SCRATCH}\n"


def test_layers_that_are_asked_the_same_are_shown_once() -> None:
    found = show.shown(parse(config("[{layers: 1, window: 8}, {}]")), 64, 4)
    assert [one.layers for one in found] == ["0, 2", "1"]
    whole, windowed = found
    assert sum(plan.cost for plan in whole.plans) > sum(plan.cost for plan in windowed.plans)
    assert whole.bytes_a_token == 2 * 2 * 16 * 4


def test_cells_are_what_the_pattern_judges() -> None:
    (one,) = show.shown(parse(config()), 64, 2)
    cells = one.cells(one.patterns[0])
    assert len(cells) == 64 and cells[5][4] == FULL and cells[5][6] == EMPTY
    (coarse,) = show.shown(parse(config("{window: 100}")), 1024, 2)
    rows = coarse.cells(coarse.patterns[0])
    assert len(rows) == 128 and rows[20][20] == CAUSAL and rows[20][8] == PARTIAL and rows[20][15] == FULL and rows[20][0] == EMPTY


def test_the_page_says_what_the_plans_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text(config("{window: 8}"))
    assert cli.main(["show", str(tmp_path / "c.yaml"), "--tokens", "64", "--ranks", "4", "--out", str(tmp_path / "p.html")]) == 0
    assert "p.html" in capsys.readouterr().err
    page = (tmp_path / "p.html").read_text()
    (one,) = show.shown(parse(config("{window: 8}")), 64, 4)
    assert page.count("<svg") == 1 and f"{sum(plan.cost for plan in one.plans):,} query-key pairs on 4 ranks" in page
    assert all(plan.explain().splitlines()[0] in page for plan in one.plans)
    assert (
        re.search(r"http(?!://www\.w3\.org|://purl\.org|://creativecommons|s://matplotlib)", page) is None
    )  # nothing is loaded from elsewhere


def traced(folder: Path, rank: int, late: float) -> Timeline:
    """A call of a tenth of a second, whose one exchange was waited for during half of it."""
    timeline = Timeline()
    timeline.origin, timeline._start = 1000.0 + late, 0.0
    timeline._calls.append(("forward", 0.0, 0.1))
    trip = timeline.trip("keys", "keys at hop 1", 300, 200)
    trip.moments[:] = [0.01, 0.02, 0.04, 0.09]
    save(timeline, folder, rank)
    return timeline


def test_timelines_of_ranks_lie_over_each_other(tmp_path: Path) -> None:
    timeline = traced(tmp_path, 0, 0.0)
    traced(tmp_path, 1, 0.25)
    assert timeline.computing() == [Span(0.0, 0.01), Span(0.02, 0.04), Span(0.09, 0.1)]
    first, second = ranks(merged(tmp_path))
    assert first.rows["calls"][0][1] == pytest.approx(0) and second.rows["calls"][0][1] == pytest.approx(0.25)
    assert first.seconds("computing") == pytest.approx(0.04) and first.seconds("posting and waiting") == pytest.approx(0.06)
    ((what, times, received, sent, seconds),) = second.moved()
    assert (what, times, received, sent) == ("keys at hop 1", 1, 300, 200) and seconds == pytest.approx(0.06)


def test_timelines_are_drawn_and_merged(tmp_path: Path) -> None:
    for rank in range(2):
        traced(tmp_path, rank, 0.0)
    assert cli.main(["show", "--trace", str(tmp_path), "--out", str(tmp_path / "p.html")]) == 0
    page = (tmp_path / "p.html").read_text()
    assert page.count("<svg") == 1 and "keys at hop 1" in page and "<td>60.0</td>" in page  # of a call, 60 % were not computing
    events = json.loads((tmp_path / "p.trace.json").read_text())["traceEvents"]
    assert {event["pid"] for event in events} == {0, 1} and min(event["ts"] for event in events if event["ph"] == "X") == 0


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["--out", "p.html"], "Nothing to show"), (["--out", "p.txt", "--trace", "."], "ends in .html"),
        (["--out", "p.html", "--trace", "nowhere"], "There is no rank-0.trace.json"),
        (["c.yaml", "--out", "p.html"], "once a text is read"),
    ],
)  # fmt: skip
def test_what_cannot_be_shown_is_refused(
    asked: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(config("{select: {kind: moba}}"))
    assert cli.main(["show", *asked]) == 2
    assert said in capsys.readouterr().err
