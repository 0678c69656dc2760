"""Predictions from few keys: with all of them they are the dense ones, and a window is a window."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tensorboard")

from ringctx.cli import main
from ringctx.config import Config
from ringctx.core.ring import Ring
from ringctx.errors import ConfigError
from ringctx.runtime.engine import Engine
from ringctx.tools.eval import Asked, budgets, measure
from ringctx.training import loop
from ringctx.training.measure import held_out
from tests.training import TINY, config, trainer_from

LENGTH = 33


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two small models that learned for a while, with a carry and without."""
    folder = tmp_path_factory.mktemp("budgets")
    more = ("training.steps=40", "training.learning_rate=0.02")
    plain = ("attention.carry.kind=none", "training.memory_loss=0")
    return {
        name: Path(loop.train(config(folder / name, *more, *rest), Ring.alone())["checkpoint"])
        for name, rest in (("selective", ()), ("plain", plain))
    }


def engine(path: Path, *overrides: str) -> Engine:
    asked: Config = config(path.parent, f"model.path={path}", *overrides)
    return Engine.load(asked, Ring.alone())


def plain(path: Path, *overrides: str) -> Engine:
    return engine(path, "attention.carry.kind=none", "training.memory_loss=0", *overrides)


def dense(path: Path, *overrides: str) -> tuple[float, float]:
    """The same predictions from one pass over whole sequences."""
    trainer = trainer_from(path, *overrides)
    found = held_out(trainer.job, budgets.pairs_of(engine(path), LENGTH))
    return found.loss, found.exact


def test_all_keys_predict_what_one_dense_pass_does(trained):
    pairs = budgets.pairs_of(engine(trained["selective"]), LENGTH)
    want = dense(trained["selective"])
    for policy in (None, budgets.policy_of("forgotten", LENGTH, LENGTH)):
        assert budgets.predicted(engine(trained["selective"]), pairs, policy) == pytest.approx(want, rel=1e-4)


def test_a_window_is_a_window(trained):
    pairs = budgets.pairs_of(plain(trained["plain"]), LENGTH)
    want = dense(trained["plain"], "attention.carry.kind=none", "training.memory_loss=0", "attention.window=5")
    assert budgets.predicted(plain(trained["plain"]), pairs, budgets.policy_of("window", 5, LENGTH)) == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("name", ["streaming", "h2o", "snapkv", "random"])
def test_other_policies_lose_nothing_with_room_for_all_and_something_with_less(trained, name):
    ours = plain(trained["plain"])
    pairs = budgets.pairs_of(ours, LENGTH)
    whole = budgets.predicted(ours, pairs, None)
    assert budgets.predicted(ours, pairs, budgets.policy_of(name, 2 * LENGTH + budgets.CHUNK, 2 * LENGTH)) == pytest.approx(whole, rel=1e-4)
    loss, _ = budgets.predicted(ours, pairs, budgets.policy_of(name, 26 if name == "snapkv" else 5, LENGTH))
    assert abs(loss - whole[0]) > 1e-5 * whole[0]  # far more than the order of a sum decides
    assert budgets.policy_of("snapkv", 20, LENGTH) is None


def test_the_search_cuts_one_layer_at_a_time_and_stops_in_time(trained):
    asked = Asked(task="search", text="", length=(LENGTH,), budget=(LENGTH,), stride=8, rise=0.05)
    rows = measure(engine(trained["selective"]).config, Ring.alone(), asked).rows
    assert rows[0].budgets == [LENGTH] * 2 and len(rows) > 1
    for before, after in zip(rows, rows[1:], strict=False):
        assert sorted(a - b for a, b in zip(before.budgets, after.budgets, strict=True)) == [0, 8]
        assert after.loss <= rows[0].loss + 0.05


def test_the_command_prints_rows_and_draws_them(trained, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(TINY)
    asked = [
        "eval",
        str(tmp_path / "c.yaml"),
        "--set",
        f"model.path={trained['selective']}",
        "--set",
        f"training.out={trained['selective'].parent}",
    ]
    asked += ["--task", "budgets", "--length", str(LENGTH), "--policy", "whole", "--policy", "forgotten", "--budget", "5", "--budget", "9"]
    assert main([*asked, "--json", "--out", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(row["policy"], row["keys"]) for row in found["rows"]] == [("whole", LENGTH), ("forgotten", 5), ("forgotten", 9)]
    assert (tmp_path / "budgets.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"task": "budgets"}, "needs --budget N"),
        ({"task": "budgets", "budget": (1,)}, "2 or more"),
        ({"task": "search", "budget": (9, 8)}, "begins with one --budget"),
        ({"task": "needle", "depth": (0.5,), "rise": 0.1}, "--rise means nothing to --task needle"),
    ],
)
def test_what_makes_no_sense_is_refused(asked, said):
    with pytest.raises(ConfigError, match=said):
        Asked(text="", length=(LENGTH,), **asked)


def test_unknown_policies_and_lengths_are_named(trained):
    with pytest.raises(ConfigError, match="--policy best is not known"):
        budgets.policy_of("best", 5, LENGTH)
    with pytest.raises(ConfigError, match="held-out sequences have 33, 66 tokens"):
        budgets.pairs_of(engine(trained["selective"]), 50)
