"""Extrapolation: the same labels at every length, blocks that a configuration takes, models that are trained once."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ringctx import Attention, ConfigError
from ringctx.asked.layers import layers_of
from ringctx.cli import main
from ringctx.config import parse
from ringctx.tools import extrapolate
from ringctx.tools.extrapolate.measure import Row, _tests, mean_of
from ringctx.tools.extrapolate.methods import METHODS, TRAINED, reading_block, trained_block
from ringctx.training import passkey, text
from ringctx.training.data import Text, data_of
from ringctx.training.labels import IGNORED
from tests.tiny import tiny


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A file; a little text stands for the corpus, and is cached in the folder of its models."""
    folder = tmp_path_factory.mktemp("extrapolate")
    inner = "context: 48, batch: 4, steps: 2, warmup: 1, passkeys: 0.5, held_out: 2"
    scratch = "{layers: 2, hidden: 32, heads: 2, key_heads: 2, intermediate: 64, vocabulary: 384}"
    path = folder / "config.yaml"
    path.write_text(f"model: {{dtype: float32, device: cpu}}\ntraining: {{scratch: {scratch}, {inner}, out: {folder / 'models'}}}\n")
    source = Path(inspect.__file__).read_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "documents", lambda book: [source[n : n + 1500] for n in range(0, 60_000, 1500)])
        yield str(path)


@pytest.mark.parametrize("length", [128, 256, 2048])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_a_block_that_a_model_takes(name: str, length: int) -> None:
    model = tiny().config
    for block in (trained_block(METHODS[name].trained, 128, 4), reading_block(name, 128, 4, length)):
        asked = layers_of(parse(f"attention: {block}").attention, model)
        assert asked is None or isinstance(asked, Attention | dict)


def test_self_extends_farthest_key_stays_within_what_was_trained() -> None:
    for length in (256, 512, 2048):
        branches = parse(f"attention: {reading_block('self_extend', 128, 4, length)}").attention.branches  # type: ignore[union-attr]
        window, group = branches.window, branches.group
        assert window is not None and group is not None
        assert (length - 1) // group + window - window // group < 128


def test_labels_are_the_same_at_every_length_and_passkeys_are_in_the_text(config: str) -> None:
    loaded = parse(Path(config).read_text())
    asked = extrapolate.check(loaded, extrapolate.Asked(length=(48, 96, 192), windows=3))
    data = data_of(loaded.training, Path(loaded.training.out) / "any", None)
    assert isinstance(data, Text)
    seen = []
    for length, ((ids, labels), hidden) in _tests(loaded, data, asked):
        assert ids.shape == labels.shape == (3, length) and int((labels != IGNORED).sum()) == 3 * 48
        seen.append(labels[labels != IGNORED])
        assert hidden is not None
        planted, answers = hidden
        assert [row[row != IGNORED].numel() for row in answers] == [passkey.DIGITS] * 3
        for row, answer in zip(planted, answers, strict=True):
            said = data.tokenizer.decode(row)
            number = data.tokenizer.decode(answer[answer != IGNORED])
            assert len(number) == 5 and said.endswith(f"The passkey is {number[:4]}") and f"The passkey is {number}. Remember it." in said
    assert all(torch.equal(one, seen[0]) for one in seen)


def test_a_passkey_is_planted_by_its_seed_and_short_texts_have_no_room(config: str) -> None:
    loaded = parse(Path(config).read_text())
    tokenizer = data_of(loaded.training, Path(loaded.training.out) / "any", None).tokenizer
    tokens = torch.randint(1, 300, (4, 60))
    one, again, other = (passkey.plant(tokens, tokenizer, seed)[0] for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other) and torch.equal(tokens, tokens.clone())
    with pytest.raises(ConfigError, match="and a sequence has 12; set context higher"):
        passkey.plant(tokens[:, :12], tokenizer, 0)


def test_models_are_trained_once_and_the_baseline_is_always_there(config: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = [
        "extrapolate",
        config,
        "--method",
        "coca, dynamic_ntk",
        "--method",
        "rope",
        "--length",
        "48",
        "--length",
        "96",
        "--windows",
        "3",
    ]
    assert main([*arguments, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [(row["method"], row["length"]) for row in rows] == [
        (name, length) for name in ("rope", "window", "coca, dynamic_ntk") for length in (48, 96)
    ]
    assert all(0 < row["loss"] < 20 and 0 <= row["digits"] <= 1 for row in rows)
    at_48 = {row["method"]: row["loss"] for row in rows if row["length"] == 48}
    assert at_48["rope"] == at_48["window"] != at_48["coca, dynamic_ntk"]
    folders = sorted(Path(parse(Path(config).read_text()).training.out).glob("*-0/step-2"))
    before = [folder.stat().st_mtime_ns for folder in folders]
    assert [folder.parent.name for folder in folders] == ["coca-0", "rope-0"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    assert [folder.stat().st_mtime_ns for folder in folders] == before
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["extrapolate.json", "extrapolate.png"]
    assert "coca, dynamic_ntk" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--method", "rotary"], "There is no method 'rotary'; there are rope, window"),
        (["--length", "20"], "A length of 20 was asked, and models are trained on 48"),
        (["--set", "training.data=variables"], "training.passkeys is 0.5"),
        (
            ["--set", "training.passkeys=0", "--set", "training.scratch.layers=0"],
            "trains small models on text; set training.scratch.layers",
        ),
        (["--set", "training.passkeys=1.5"], "it is a share of the texts"),
    ],
)
def test_what_cannot_be_is_a_sentence(config: str, more: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["extrapolate", config, *more]) == 2
    assert sentence in " ".join(capsys.readouterr().err.split())


def test_seeds_are_averaged() -> None:
    rows = [Row("rope", seed, 40, loss, None) for seed, loss in ((0, 1.0), (1, 2.0))]
    assert mean_of(rows, "rope", 40, "loss") == (1.5, 1.0) and mean_of(rows, "rope", 40, "digits") is None
    assert set(TRAINED) == {method.trained for method in METHODS.values()}
