"""Training on one rank: batches, losses, the task, logs and checkpoints, and what takes the trained model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

pytest.importorskip("transformers")
pytest.importorskip("tensorboard")

from ringctx.cli import main
from ringctx.config import parse
from ringctx.config_training import TrainingConfig, VariablesConfig
from ringctx.core.layout import Layout
from ringctx.core.ring import Ring
from ringctx.errors import ConfigError, Unsupported
from ringctx.training import checkpoint, loop, text, variables
from ringctx.training.labels import IGNORED
from ringctx.training.loss import mean_of, memory_loss, token_sum
from tests.training import batch_of, config, gradients_of, steps_of, trainer_on
from tests.virtual import run


def test_the_loss_is_the_mean_over_all_labels_that_count():
    logits = torch.randn(2, 5, 7, dtype=torch.float64)
    labels = torch.tensor([[1, IGNORED, 2, 3, IGNORED], [IGNORED] * 5])
    mean = lambda labels: mean_of(token_sum(logits, labels), (labels != IGNORED).sum(), lambda x: [x])
    assert_close(mean(labels), cross_entropy(logits.flatten(0, 1), labels.flatten()), rtol=1e-12, atol=0)
    assert float(mean(torch.full((2, 5), IGNORED))) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "vocabulary"), [(0, 7), (1, 7), (37, 97), (5, 2**20 // 2 + 3)])
def test_the_loss_and_its_gradient_are_those_of_cross_entropy(tokens: int, vocabulary: int, dtype: torch.dtype):
    make = torch.Generator().manual_seed(0)
    logits = torch.randn(2, tokens, vocabulary, generator=make).to(dtype).requires_grad_()
    labels = torch.randint(0, vocabulary, (2, tokens), generator=make)
    labels[0, : tokens // 2] = IGNORED
    exact = logits.detach().double().requires_grad_()
    want = cross_entropy(exact.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    (3 * token_sum(logits, labels)).backward()
    (3 * want).backward()
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 8e-3}[dtype]
    assert_close(token_sum(logits.detach(), labels).double(), want.detach(), rtol=1e-12 if dtype == torch.float64 else 1e-5, atol=0)
    assert_close(logits.grad.double(), exact.grad, rtol=tolerance, atol=tolerance)
    with pytest.raises(Unsupported, match="no gradient of its own"):
        torch.autograd.grad(token_sum(logits, labels), logits, create_graph=True)


def test_the_memory_loss_is_that_of_the_largest_row_and_ties_go_to_the_lower_index():
    memories = {0: torch.tensor([[1.0, 3.0, 3.0, 0.0]], requires_grad=True), 2: torch.tensor([[0.0, 1.0, 2.0, 5.0]], requires_grad=True)}
    found = memory_loss(memories, Layout.contiguous(4, 1), Ring.alone(), lambda x: [x])
    assert_close(found, torch.tensor((3.0 + 5.0) / (2 * 4)))
    found.backward()
    assert memories[0].grad.tolist() == [[0.0, 1 / 8, 0.0, 0.0]] and memories[2].grad.tolist() == [[0.0, 0.0, 0.0, 1 / 8]]


def test_the_rate_rises_and_falls():
    trainer = trainer_on(Ring.alone(), False)
    trainer.config = TrainingConfig(steps=110, warmup=10, learning_rate=2.0)
    assert [trainer.rate(n) for n in (0, 9)] == [0.2, 2.0]
    assert_close([trainer.rate(10), trainer.rate(60), trainer.rate(110)], [2.0, 1.1, 0.2])


@pytest.mark.parametrize(("kind", "length"), [("zigzag", 37), ("contiguous", 2)])
def test_gradients_of_virtual_ranks_average_to_those_of_one_and_their_steps_are_those_of_one(kind, length):
    want, (said, weights) = gradients_of(Ring.alone(), kind, length, True), steps_of(Ring.alone(), kind, length, True)
    # 4 ranks: the model's norms compute in fp32, where 4 times a gradient is exact and 3 times one is not
    totals = [sum(x) / 4 for x in zip(*run(gradients_of, kind, length, True, size=4), strict=True)]
    assert all(float((total - one).norm()) <= 1e-12 * max(float(one.norm()), 1e-3) for total, one in zip(totals, want, strict=True))
    for theirs, of_theirs in run(steps_of, kind, length, True, size=4):
        assert_close(theirs, said, rtol=1e-9, atol=0)
        assert_close(of_theirs, weights, rtol=1e-7, atol=1e-9)


def test_the_memory_loss_counts_from_its_step_on():
    weights = []
    for number in (2, 3):
        trainer = trainer_on(Ring.alone(), True, memory_from=3)
        before = trainer.step(batch_of(Ring.alone(), "zigzag", 20), number)
        assert before.memory > 0
        weights.append(before.grad_norm)
    plain = trainer_on(Ring.alone(), True, memory_loss=0.0)
    assert plain.step(batch_of(Ring.alone(), "zigzag", 20), 2).grad_norm == pytest.approx(weights[0], rel=1e-9)
    assert weights[1] != pytest.approx(weights[0], rel=1e-6)


# -- data ---------------------------------------------------------------------------------------------------------------


def test_every_question_is_answered_by_the_latest_value():
    task = VariablesConfig(names=3, values=5, noise=2)
    ids, labels = variables.draw(task, 6, 200, seed=1)
    words = variables.vocabulary(task)
    asked = 0
    for line, answers in zip(ids.tolist(), labels.tolist(), strict=True):
        latest: dict[str, str] = {}
        for token, answer in zip(line, answers, strict=True):
            word = words[token]
            if answer != IGNORED:
                assert word.endswith("?") and words[answer] == latest[word[:-1]]
                asked += 1
            if "=" in word:
                name, value = word.split("=")
                latest[name] = value
        for token, following in zip(line, line[1:], strict=False):
            assert words[following].startswith("value") or not words[token].endswith("?")
        assert words[line[0]] == "<begin>"
    assert asked > 40
    at = [[n for n, answer in enumerate(row) if answer != IGNORED] for row in labels.tolist()]
    ages = variables.ages(task, ids, labels).tolist()
    for row, places in enumerate(at):
        for place in places:
            name = words[int(ids[row, place])][:-1]
            assert words[int(ids[row, place - ages.pop(0)])] == f"{name}={words[int(labels[row, place])]}"
    assert torch.equal(variables.draw(task, 6, 200, seed=1)[0], ids) and not torch.equal(variables.draw(task, 6, 200, seed=2)[0], ids)


def test_held_out_documents_are_never_trained_on(tmp_path, monkeypatch):
    texts = [f"document{n} says w{n} " * 30 for n in range(45)]
    monkeypatch.setattr(text, "documents", lambda book: texts)
    found = text.corpus(tmp_path, 300)
    train, held_out = (found.tokenizer.decode(x.tolist()) for x in (found.train, found.held_out))
    names = [f"document{n} " for n in range(45)]
    assert [name in held_out for name in names] == [n % text.HELD_OUT == 0 for n in range(45)]
    assert [name in train for name in names] == [n % text.HELD_OUT != 0 for n in range(45)]
    assert train.count(text.END) == 42
    monkeypatch.setattr(text, "documents", lambda book: pytest.fail("made twice"))
    assert torch.equal(text.corpus(tmp_path, 300).train, found.train)


def test_windows_lie_side_by_side_or_where_the_seed_says():
    tokens = torch.arange(100)
    assert text.windows(tokens, 9, 30, None).tolist() == [list(range(a, a + 30)) for a in (0, 30, 60)]
    drawn = text.windows(tokens, 50, 30, 3)
    assert torch.equal(drawn, text.windows(tokens, 50, 30, 3)) and len(set(drawn[:, 0].tolist())) > 20
    with pytest.raises(ConfigError, match="has 100 tokens, and a window 101"):
        text.windows(tokens, 1, 101, None)


def test_the_real_corpus_is_there():
    found = text.documents(Path(__file__).parents[2] / text.BOOK)
    assert sum(map(len, found)) > 8_000_000 and any("In the beginning God created" in one for one in found)
    with pytest.raises(ConfigError, match="run ringctx where the repository lies"):
        text.documents(Path("nowhere.gz"))


# -- runs ---------------------------------------------------------------------------------------------------------------


def test_a_run_that_broke_off_ends_as_if_it_had_not(tmp_path):
    whole = loop.train(config(tmp_path / "whole"), Ring.alone())
    assert whole["steps"] == len(whole["loss"]) == len(whole["grad_norm"]) == 8 and all(map(math.isfinite, whole["loss"]))
    assert [one["steps"] for one in whole["held_out"]] == [0, 4, 8] and [row["length"] for row in whole["held_out"][0]["rows"]] == [33, 66]
    broken = config(tmp_path / "broken")
    with pytest.MonkeyPatch.context() as patch:
        step = loop.Trainer.step
        patch.setattr(loop.Trainer, "step", lambda self, batch, n: step(self, batch, n) if n < 5 else pytest.fail("power cut"))
        with pytest.raises(pytest.fail.Exception):
            loop.train(broken, Ring.alone())
    assert checkpoint.newest(tmp_path / "broken").name == "step-4"
    resumed = loop.train(broken, Ring.alone())
    for key in ("loss", "grad_norm", "memory_loss", "held_out"):
        assert resumed[key] == whole[key]
    lines = [[json.loads(x) for x in (tmp_path / name / "log.jsonl").read_text().splitlines()] for name in ("whole", "broken")]
    assert lines[0] == lines[1]
    assert sorted(p.name for p in (tmp_path / "whole").iterdir() if p.name.startswith("step-")) == ["step-8"]
    assert (tmp_path / "whole" / "loss.png").stat().st_size > 1000


def test_another_run_does_not_go_on_in_its_folder(tmp_path):
    loop.train(config(tmp_path, "training.steps=2"), Ring.alone())
    with pytest.raises(ConfigError, match="holds a run with other attention, steps, learning_rate, memory_loss"):
        changed = ("attention.carry.kind=none", "training.memory_loss=0", "training.learning_rate=0.1")
        loop.train(config(tmp_path, *changed), Ring.alone())


def test_two_runs_do_not_write_into_one_folder(tmp_path):
    with FileLock(tmp_path / "run.lock"), pytest.raises(ConfigError, match="Another run trains into .*; wait for it to end"):
        loop.train(config(tmp_path, "training.steps=2"), Ring.alone())
    loop.train(config(tmp_path, "training.steps=2"), Ring.alone())


def test_it_learns(tmp_path):
    found = loop.train(config(tmp_path, "training.steps=60", "training.learning_rate=0.01", "training.save_every=100"), Ring.alone())
    assert sum(found["loss"][-5:]) < 0.8 * sum(found["loss"][:5])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("training: {memory_loss: 0.1}", "set attention.carry.kind to selective"),
        ("model: {tensor_parallel: 2}", "set model.tensor_parallel to 1"),
    ],
)
def test_what_cannot_be_trained_is_refused(text, said):
    with pytest.raises(ConfigError, match=said):
        loop.check(parse(text))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("training: {steps: 0}", "training.steps is 0; it must be at least 1"),
        ("training: {scratch: {layers: 1, hidden: 10, heads: 4}}", "heads must divide hidden"),
        ("training: {data: variables}", "set training.scratch.layers"),
        ("training: {variables: {asked: 1.0}}", "asked between 0 and 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(text, said):
    with pytest.raises(ConfigError, match=said):
        parse(text)


def test_the_command_trains_and_other_commands_take_the_model(tmp_path, capsys):
    from tests.training import TINY

    (tmp_path / "c.yaml").write_text(TINY)
    assert main(["train", str(tmp_path / "c.yaml"), "--set", f"training.out={tmp_path / 'run'}", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"steps", "loss", "grad_norm", "tokens_per_second", "memory"} <= set(result)
    (tmp_path / "text.txt").write_text("name0=value1 noise0 name1=value2 noise1 name0=value3 " * 8)
    took = [str(tmp_path / "c.yaml"), "--set", f"model.path={result['checkpoint']}", "--document", str(tmp_path / "text.txt")]
    assert main(["generate", *took, "--question", "name0?", "--json", "--set", "generation.max_new_tokens=3"]) == 0
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])["tokens"]) == 3
    assert main(["eval", *took, "--task", "perplexity", "--length", "30", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]


def test_a_run_that_is_older_than_a_key_goes_on_with_what_the_key_says_by_default():
    otherwise = {"attention": {"window": None, "pattern": {"kind": "causal", "rate": None}}, "passkeys": 0.0, "seed": 0}
    saved = {"attention": {"window": 9, "pattern": {"kind": "atrous"}}, "seed": 1}
    assert checkpoint._filled(saved, otherwise) == {
        "attention": {"window": 9, "pattern": {"kind": "atrous", "rate": None}}, "passkeys": 0.0, "seed": 1
    }  # fmt: skip
    blocks = checkpoint._filled({"attention": [{"layers": 0}, {"window": 5}]}, otherwise)["attention"]
    assert [block["pattern"]["kind"] for block in blocks] == ["causal", "causal"] and blocks[1]["window"] == 5
