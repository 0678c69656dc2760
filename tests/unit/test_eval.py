"""ringctx eval on one process: what is planted, counted and predicted, against the definitions."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

transformers = pytest.importorskip("transformers")

from ringctx.cli import main  # noqa: E402
from ringctx.config import parse  # noqa: E402
from ringctx.core.ring import Ring  # noqa: E402
from ringctx.errors import ConfigError  # noqa: E402
from ringctx.huggingface import FAMILIES, wrap  # noqa: E402
from ringctx.patterns import causal, fixed, sinks, strided, window  # noqa: E402
from ringctx.runtime import engine as runtime_engine  # noqa: E402
from ringctx.runtime import weights  # noqa: E402
from ringctx.runtime.engine import Engine, Listener  # noqa: E402
from ringctx.tools.eval import Asked, check_out, needle, perplexity, report  # noqa: E402
from ringctx.tools.eval.asked import Result  # noqa: E402
from ringctx.tools.eval.density import density, pairs  # noqa: E402
from tests.tiny import tiny  # noqa: E402

TINY = str(Path(__file__).parents[2] / "configs" / "tiny_cpu.yaml")
TEXT = " ".join(f"Verse {n} says that the number of waters is {n * n} and no more." for n in range(60))
ROW = ["length", "depth", "correct", "seconds", "density", "bytes"]


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    """A cache folder of this module's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def document(tmp_path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


def engine(*overrides: str) -> Engine:
    return Engine.load(parse("model: {path: random-tiny, dtype: float32, device: cpu}", overrides), Ring.alone())


def own_losses(model: Any, tokens: list[int]) -> torch.Tensor:
    """transformers' own attention and cross entropy, on one sequence."""
    ids = torch.tensor([tokens])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits.float(), ids[0, 1:], reduction="none")


# -- perplexity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "overrides"),
    [
        (2, ()),
        (3, ()),
        (301, ()),
        (257, ("layout.chunk=64",)),
        (256, ("layout.chunk=1000",)),
        (130, ("layout.kind=striped", "layout.chunk=37")),
    ],
    ids=str,
)
def test_perplexity_is_transformers_own_cross_entropy(length, overrides):
    ours = engine(*overrides)
    tokens = perplexity.tokens_of(ours, TEXT, length)
    rows = perplexity.run(ours, tokens, Listener())
    want = own_losses(transformers.AutoModelForCausalLM.from_pretrained(weights.checkpoint("random-tiny"), dtype=torch.float32), tokens)
    assert sum(row.tokens for row in rows) == length - 1
    for row in rows:
        part = want[row.length // 2 : row.length]  # the prediction at i has i + 1 tokens of context
        assert row.tokens == len(part)
        assert row.nll == pytest.approx(float(part.double().mean()), rel=1e-5)
        assert row.perplexity == pytest.approx(float(part.double().mean().exp()), rel=1e-4)
    assert rows[-1].length >= length - 1 > rows[-1].length // 2
    assert all(row.density == 1.0 and row.bytes == 0 and row.depth is row.correct is None for row in rows)


@pytest.mark.parametrize("kind", FAMILIES)
def test_losses_pass_through_every_familys_own_head(kind):
    tokens = torch.randint(0, 40, (45,), generator=torch.Generator().manual_seed(1)).tolist()
    want = own_losses(tiny(kind), tokens)
    model = tiny(kind)
    ours = Engine(model, None, wrap(model, Ring.alone()), parse("layout: {chunk: 20}"), torch.device("cpu"))
    indices, losses = ours.losses(tokens)
    assert indices.tolist() == list(range(44))
    torch.testing.assert_close(losses, want, rtol=1e-4, atol=1e-5)
    assert "forward" not in vars(model.base_model)


def test_logits_never_exist_for_more_rows_than_a_tile(monkeypatch):
    monkeypatch.setattr(runtime_engine, "LOGIT_ROWS", 16)
    ours, widths = engine(), []
    whole = ours.losses(list(range(1, 101)))[1]
    ours.model.lm_head.register_forward_hook(lambda _, __, out: widths.append(out.shape[1]))
    torch.testing.assert_close(ours.losses(list(range(1, 101)))[1], whole, rtol=0, atol=0)
    assert max(widths) == 16
    assert sum(widths) == 99


# -- needle -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("length", [200, 333, 1024])
def test_a_needle_lies_at_its_depth_in_a_prompt_of_the_asked_length(length, depth):
    ours = engine()
    planted = needle.plant(ours, TEXT, length, depth, seed=3)
    assert length - needle.SLACK <= len(planted.prompt) <= length
    prompt = ours.tokenizer.decode(planted.prompt)
    sentence = needle.NEEDLE.format(number=planted.number)
    assert prompt.count(planted.number) == 1
    assert prompt == f"<|user|>{planted.text}\n\n{needle.QUESTION}<|model|>{needle.BEGINNING}"
    at, sentence_length = planted.text.index(sentence), 66
    assert abs(at - depth * (len(planted.text) - len(sentence))) <= sentence_length
    assert at == 0 or planted.text[at - 2] in ".!?"
    assert (planted.text[:at] + planted.text[at + len(sentence) + 1 :]).strip() in TEXT


def test_tokens_of_many_characters_fill_the_asked_length_too():
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=400, show_progress=False, initial_alphabet=alphabet))
    ours = engine()
    ours.tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made)  # without a chat template
    for length in range(160, 480, 7):
        planted = needle.plant(ours, TEXT, length, 0.5, seed=length)
        assert length - needle.SLACK <= len(planted.prompt) <= length
        assert planted.prompt[-len(made.encode(needle.BEGINNING).ids) + 2 :] == made.encode(needle.BEGINNING).ids[2:]


def test_numbers_and_places_depend_on_seed_length_and_depth_alone():
    ours = engine()
    made = {where: needle.plant(ours, TEXT, *where) for where in ((300, 0.5, 0), (300, 0.5, 1), (300, 0.0, 0), (301, 0.5, 0))}
    assert len({planted.number for planted in made.values()}) == 4
    assert made[300, 0.5, 0] == needle.plant(ours, TEXT, 300, 0.5, 0)


@settings(max_examples=50, deadline=None)
@given(some.text(alphabet="ab .!\n", max_size=60), some.floats(0, 1))
def test_hiding_keeps_the_text_and_takes_the_nearest_sentence_end(text, depth):
    before, _, after = needle.hide("NEEDLE", text, depth).partition("NEEDLE")
    before = before[:-1]  # the space that was added
    assert text.startswith(before)
    assert text[len(before) :] in (after, after[1:])
    ends = [at for at in range(1, len(text) + 1) if text[at - 1] in ".!" and not text[at : at + 1].strip()]
    assert len(before) in (0, *ends)
    assert abs(len(before) - depth * len(text)) == min(abs(at - depth * len(text)) for at in (0, *ends))


@pytest.mark.parametrize(("said", "is_correct"), [(" 12345.", True), ("\n12345", True), (" not 12345", False), (" 1234", False)])
def test_correct_when_the_numbers_digits_begin_the_answer(monkeypatch, said, is_correct):
    ours = engine()
    tokens = ours.tokenizer(said).input_ids
    monkeypatch.setattr(runtime_engine.Sampler, "choose", lambda self, _: tokens.pop(0) if tokens else 0)
    row = needle.run(ours, needle.Planted(list(range(3, 60)), "", "12345"), 57, 0.5, Listener())
    assert row.correct is is_correct
    assert row.answer.strip() == said.strip()
    assert row.density == 1.0
    assert row.bytes == 0
    assert len(row.memory) == 1


# -- density ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern",
    [causal(), causal() & window(7), causal() & (window(600) | sinks(4)), strided(9), fixed(32, 3), causal() & window(5000)],
    ids=str,
)
@pytest.mark.parametrize("length", [1, 50, 1700])
def test_pairs_are_those_of_the_dense_mask(pattern, length):
    indices = torch.arange(length)
    assert pairs(pattern, length) == int(pattern.allows(indices, indices).sum())


def test_density_counts_the_window_and_the_models_own_layers():
    ours = engine("attention.window=10", "attention.sinks=2")
    ours.losses(list(range(1, 101)))
    indices = torch.arange(100)
    allowed = int((causal() & (window(10) | sinks(2))).allows(indices, indices).sum())
    assert density(ours, 100) == allowed / 5050
    model = tiny("gemma2", sliding_window=8)  # in every other layer
    theirs = Engine(model, None, wrap(model, Ring.alone()), parse(""), torch.device("cpu"))
    theirs.losses(list(range(1, 31)))
    narrow = int((causal() & window(8)).allows(indices[:30], indices[:30]).sum())
    assert 1 == len({p for n, p in theirs.context.patterns.items() if n % 2})
    layers = len(theirs.context.patterns)
    assert density(theirs, 30) == pytest.approx(((layers + 1) // 2 * narrow + layers // 2 * 465) / (layers * 465))


# -- the command ----------------------------------------------------------------------------------------------------------


def test_eval_prints_needles_with_their_pinned_keys(capsys, document):
    typed = ["eval", TINY, "--task", "needle", "--document", document, "--length", "200", "--length", "240"]
    assert main([*typed, "--depth", "0", "--depth", "1", "--set", "attention.window=50", "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert list(result) == ["task", "rows", "accuracy", "protocol"]
    assert [(row["length"], row["depth"]) for row in result["rows"]] == [(200, 0.0), (200, 1.0), (240, 0.0), (240, 1.0)]
    assert all(list(row) == [*ROW, "prompt_tokens", "number", "answer", "memory"] for row in result["rows"])
    assert all(0.3 < row["density"] < 0.5 for row in result["rows"])
    assert result["accuracy"] == sum(row["correct"] for row in result["rows"]) / 4
    assert "Needles: reading" in err
    assert main([*typed, "--depth", "0"]) == 0
    assert "correct" in capsys.readouterr().out


def test_eval_writes_perplexity_with_its_pinned_keys(capsys, document, tmp_path):
    typed = ["eval", TINY, "--task", "perplexity", "--document", document, "--length", "100", "--out", str(tmp_path / "a" / "b"), "--json"]
    assert main(typed) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["task"], result["accuracy"]) == ("perplexity", None)
    assert [row["length"] for row in result["rows"]] == [1, 2, 4, 8, 16, 32, 64, 128]
    assert all(list(row) == [*ROW, "nll", "perplexity", "tokens"] for row in result["rows"])
    assert "One pass over the first N tokens, no stride" in result["protocol"]
    assert json.loads((tmp_path / "a" / "b" / "perplexity.json").read_text()) == result


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["needle", "--depth", "0.5"], "needs --length N"),
        (["needle", "--length", "200"], "needs --depth D, from 0 to 1"),
        (["needle", "--length", "90", "--depth", "0"], "--length 90 is too short for a needle: it takes"),
        (["needle", "--length", "9000", "--depth", "0"], "--length 9000 needs more text than the document has"),
        (["needle", "--length", "200", "--depth", "2"], "2.0 is not in the range 0<=x<=1"),
        (["perplexity", "--length", "90", "--depth", "0"], "leave --depth out"),
        (["perplexity", "--length", "90", "--length", "91"], "give one --length"),
        (["perplexity", "--length", "9000"], "--length 9000 asks for more than the document's"),
        (["variables"], "'variables' is not one of 'needle', 'perplexity'"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(arguments, sentence, document, capsys):
    assert main(["eval", TINY, "--document", document, "--task", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert sentence in err.replace("\n", " ")
    assert "Traceback" not in err


def test_a_picture_without_matplotlib_is_refused_before_anything_is_measured(monkeypatch, tmp_path):
    asked = Asked(task="needle", text="A.", lengths=(9,), depths=(0.0,))
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'ringctx\[plot\]'"):
        check_out(asked, tmp_path)
    check_out(asked, None)


def test_a_picture_of_needles_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    draw = random.Random(0)
    cases = [(length, depth) for length in (512, 1024, 2048) for depth in (0.0, 0.5, 1.0)]
    common = {"seconds": 1.0, "density": 1.0, "bytes": 0, "prompt_tokens": 9, "number": "12345", "answer": "", "memory": [1]}
    rows = [needle.NeedleRow(length=n, depth=depth, correct=draw.random() < 0.5, **common) for n, depth in cases]
    files = report.write(Result(task="needle", rows=rows, accuracy=0.5, protocol=""), tmp_path)
    assert [path.name for path in files] == ["needle.json", "needle.png"]
    assert files[1].read_bytes().startswith(b"\x89PNG")
