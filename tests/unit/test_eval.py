"""ringctx eval on one process: what is planted, counted and predicted, against the definitions."""

from __future__ import annotations

import json
import mmap
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from ringctx.cli import main  # noqa: E402
from ringctx.config import parse  # noqa: E402
from ringctx.core.ring import Ring  # noqa: E402
from ringctx.errors import ConfigError  # noqa: E402
from ringctx.huggingface import (  # noqa: E402
    FAMILIES,
    weights,
    wrap,
)
from ringctx.patterns import causal, fixed, sinks, strided, window  # noqa: E402
from ringctx.runtime import losses as runtime_losses  # noqa: E402
from ringctx.runtime.answer import Listener  # noqa: E402
from ringctx.runtime.engine import Engine  # noqa: E402
from ringctx.runtime.losses import token_losses  # noqa: E402
from ringctx.tools import output  # noqa: E402
from ringctx.tools.eval import Asked, check_out, needle, perplexity, report, watch  # noqa: E402
from ringctx.tools.eval.asked import Result  # noqa: E402
from ringctx.tools.eval.density import density, pairs  # noqa: E402
from tests.tiny import tiny  # noqa: E402

TINY = str(Path(__file__).parents[2] / "configs" / "tiny_cpu.yaml")
TEXT = " ".join(f"Verse {n} says that the number of waters is {n * n} and no more." for n in range(60))
COST = ["prefill_seconds", "answer_seconds", "memory", "anonymous"]
ROW = ["length", "depth", "correct", "seconds", "density", "bytes", *COST]


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
    tokens = perplexity.tokens_of(ours, TEXT, length, "--length")
    rows = perplexity.one_pass(ours, tokens, Listener())
    want = own_losses(transformers.AutoModelForCausalLM.from_pretrained(weights.checkpoint("random-tiny"), dtype=torch.float32), tokens)
    assert sum(row.tokens for row in rows) == length - 1
    for row in rows:
        part = want[row.length // 2 : row.length]  # the prediction at i has i + 1 tokens of context
        assert row.tokens == len(part)
        assert row.nll == pytest.approx(float(part.double().mean()), rel=1e-5)
        assert row.perplexity == pytest.approx(float(part.double().mean().exp()), rel=1e-4)
    assert rows[-1].length >= length - 1 > rows[-1].length // 2
    assert all(row.density == 1.0 and row.bytes == 0 and row.depth is row.correct is None for row in rows)


@pytest.mark.parametrize(
    ("num_tokens", "length", "stride"),
    [(150, 64, 16), (150, 64, 63), (99, 50, 49), (64, 64, 10), (65, 64, 10), (40, 7, 1), (5, 2, 1)],
    ids=str,
)
def test_windows_predict_each_token_once_as_transformers_own_windows_do(num_tokens, length, stride):
    ours = engine("layout.chunk=20")
    tokens = perplexity.tokens_of(ours, TEXT, num_tokens, "--tokens")
    row = perplexity.through_windows(ours, tokens, length, stride, Listener())
    model = transformers.AutoModelForCausalLM.from_pretrained(weights.checkpoint("random-tiny"), dtype=torch.float32)
    want, done, begin, num_windows = [], 1, 0, 0
    while done < num_tokens:  # the definition: a window at a time, what it adds is predicted
        end = min(begin + length, num_tokens)
        want.append(own_losses(model, tokens[begin:end])[done - begin - 1 :])
        done, begin, num_windows = end, begin + stride, num_windows + 1
    wanted = torch.cat(want).double()
    assert len(wanted) == row.tokens == num_tokens - 1
    assert row.nll == pytest.approx(float(wanted.mean()), rel=1e-5)
    assert row.perplexity == pytest.approx(float(wanted.mean().exp()), rel=1e-4)
    assert (row.length, row.windows, row.density, row.bytes, row.depth, row.correct) == (length, num_windows, 1.0, 0, None, None)


@pytest.mark.parametrize("kind", FAMILIES)
def test_losses_pass_through_every_familys_own_head(kind):
    tokens = torch.randint(0, 40, (45,), generator=torch.Generator().manual_seed(1)).tolist()
    want = own_losses(tiny(kind), tokens)
    model = tiny(kind)
    ours = Engine(model, None, wrap(model, Ring.alone()), parse("layout: {chunk: 20}"), torch.device("cpu"))
    indices, losses = token_losses(ours, tokens)
    assert indices.tolist() == list(range(44))
    torch.testing.assert_close(losses, want, rtol=1e-4, atol=1e-5)
    assert "forward" not in vars(model.base_model)


def test_logits_never_exist_for_more_rows_than_a_tile(monkeypatch):
    monkeypatch.setattr(runtime_losses, "LOGIT_ROWS", 16)
    ours, widths = engine(), []
    whole = token_losses(ours, list(range(1, 101)))[1]
    ours.model.lm_head.register_forward_hook(lambda _, __, out: widths.append(out.shape[1]))
    torch.testing.assert_close(token_losses(ours, list(range(1, 101)))[1], whole, rtol=0, atol=0)
    assert max(widths) == 16
    assert sum(widths) == 99


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
    token_losses(ours, list(range(1, 101)))
    indices = torch.arange(100)
    allowed = int((causal() & (window(10) | sinks(2))).allows(indices, indices).sum())
    assert density(ours) == allowed / 5050
    model = tiny("gemma2", sliding_window=8)  # in every other layer
    theirs = Engine(model, None, wrap(model, Ring.alone()), parse(""), torch.device("cpu"))
    token_losses(theirs, list(range(1, 31)))
    narrow = int((causal() & window(8)).allows(indices[:30], indices[:30]).sum())
    assert 1 == len({p for n, p in theirs.context.patterns.items() if n % 2})
    layers = len(theirs.context.patterns)
    assert density(theirs) == pytest.approx(((layers + 1) // 2 * narrow + layers // 2 * 465) / (layers * 465))


# -- what a run costs -----------------------------------------------------------------------------------------------------


def test_a_peak_of_anonymous_memory_is_seen_and_files_are_not_in_it(tmp_path):
    before = watch.now()
    assert before is not None
    size = 64 * 2**20
    with watch.anonymous() as peak, mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:  # malloc may have some at hand
        for _ in range(64):  # by the megabyte: what malloc is given back it may keep
            block.write(b"1" * 2**20)
        time.sleep(20 * watch.INTERVAL)
    assert peak.bytes is not None
    assert before + 0.9 * size < peak.bytes < before + 1.5 * size
    (tmp_path / "file").write_bytes(bytes(size))
    with watch.anonymous() as mapped:
        held = torch.from_file(str(tmp_path / "file"), shared=True, size=size // 4)
        assert float(held.sum()) == 0
        time.sleep(20 * watch.INTERVAL)
    assert mapped.bytes is not None
    assert mapped.bytes < before + 0.5 * size


def test_a_system_that_does_not_tell_gives_none_and_the_watch_ends_with_an_error(monkeypatch, tmp_path):
    with pytest.raises(ZeroDivisionError), watch.anonymous():
        _ = 1 / 0
    assert not [thread for thread in threading.enumerate() if thread.name == "ringctx-watch"]
    monkeypatch.setattr(watch, "STATUS", tmp_path / "nothing")
    with watch.anonymous() as peak:
        pass
    assert peak.bytes is None


# -- the command ----------------------------------------------------------------------------------------------------------


def test_eval_prints_needles_with_their_pinned_keys(capsys, document):
    typed = ["eval", TINY, "--task", "needle", "--document", document, "--length", "200", "--length", "240"]
    assert main([*typed, "--depth", "0", "--depth", "1", "--set", "attention.window=50", "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert list(result) == ["task", "rows", "accuracy", "protocol"]
    assert [(row["length"], row["depth"]) for row in result["rows"]] == [(200, 0.0), (200, 1.0), (240, 0.0), (240, 1.0)]
    assert all(list(row) == [*ROW, "prompt_tokens", "wording", "seed", "number", "answer"] for row in result["rows"])
    assert all(row["seconds"] == pytest.approx(row["prefill_seconds"] + row["answer_seconds"]) for row in result["rows"])
    assert all(row["memory"][0] > row["anonymous"][0] > 0 for row in result["rows"])
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
    assert all(list(row) == [*ROW, "nll", "perplexity", "tokens", "windows"] for row in result["rows"])
    assert all(row["answer_seconds"] is None and row["prefill_seconds"] == row["seconds"] for row in result["rows"])
    assert "One pass over the first N tokens, no stride" in result["protocol"]
    assert json.loads((tmp_path / "a" / "b" / "perplexity.json").read_text()) == result


def test_eval_prints_several_needles_variables_and_windows_with_their_pinned_keys(capsys, document):
    def run(*typed: str) -> tuple[dict[str, Any], str]:
        assert main(["eval", TINY, "--document", document, *typed, "--json"]) == 0
        made = json.loads(capsys.readouterr().out)
        assert main(["eval", TINY, "--document", document, *typed]) == 0
        return made, capsys.readouterr().out

    result, _ = run("--task", "needles", "--length", "700", "--count", "3", "--wording", "diary", "--seed", "5")
    (row,) = result["rows"]
    assert list(row) == [*ROW, "prompt_tokens", "wording", "seed", "found", "needles"]
    assert [list(needle) for needle in row["needles"]] == [["name", "depth", "number", "answer", "correct"]] * 3
    assert (row["wording"], row["seed"], row["depth"]) == ("diary", 5, None)
    assert result["protocol"].startswith("3 needles, each of a name")
    result, _ = run("--task", "variables", "--length", "700", "--hops", "2", "--count", "2", "--seed", "0", "--seed", "1")
    assert [row["seed"] for row in result["rows"]] == [0, 1]
    assert all(list(row) == [*ROW, "prompt_tokens", "seed", "variable", "number", "answer"] for row in result["rows"])
    assert result["protocol"].startswith("Chains: 2 numbers of five digits are each given to a variable and handed on 2 times")
    result, shown = run("--task", "perplexity", "--length", "30", "--length", "60", "--stride", "10", "--tokens", "100")
    assert [(row["length"], row["windows"], row["tokens"]) for row in result["rows"]] == [(30, 8, 99), (60, 5, 99)]
    assert "slide over the first 100 tokens by 10" in result["protocol"]
    headings = ("length", "windows", "tokens", "nll", "perplexity", "read s", "answer s", "density", "MB sent", "peak MB", "anon. MB")
    assert all(heading in shown for heading in headings)
    assert "…" not in shown


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["needle", "--depth", "0.5"], "needs --length N"),
        (["needle", "--length", "200"], "needs --depth D, from 0 to 1"),
        (["needle", "--length", "90", "--depth", "0"], "--length 90 is too short: what is hidden takes"),
        (["needle", "--length", "9000", "--depth", "0"], "--length 9000 needs more text than the document has"),
        (["needle", "--length", "200", "--depth", "2"], "2.0 is not in the range 0<=x<=1"),
        (["perplexity", "--length", "90", "--depth", "0"], "leave --depth out"),
        (["perplexity", "--length", "90", "--length", "91"], "give one --length"),
        (["perplexity", "--length", "9000"], "--length 9000 asks for more than the document's"),
        (["perplexity", "--length", "90", "--stride", "9"], "needs both --stride S"),
        (["perplexity", "--length", "90", "--tokens", "99"], "needs both --stride S"),
        (["perplexity", "--length", "90", "--stride", "90", "--tokens", "99"], "--stride is 90; it may be 1 to 89"),
        (["perplexity", "--length", "90", "--stride", "0", "--tokens", "99"], "--stride is 0; it may be 1 to 89"),
        (["perplexity", "--length", "90", "--stride", "9", "--tokens", "89"], "--tokens is 89, but a window has 90"),
        (["perplexity", "--length", "90", "--stride", "9", "--tokens", "9999"], "--tokens 9999 asks for more than the document's"),
        (["perplexity", "--length", "90", "--seed", "0"], "--seed means nothing to --task perplexity"),
        (["needle", "--length", "200", "--depth", "0", "--wording", "verse"], "--wording verse is not known; there are plain, diary,"),
        (["needle", "--length", "200", "--depth", "0", "--count", "2"], "ask for --task needles or --task variables"),
        (["needles", "--length", "200", "--depth", "0", "--count", "2"], "--count 2 needles and 1 --depth do not fit"),
        (["variables", "--length", "200", "--depth", "0"], "--depth means nothing to --task variables; leave --depth out"),
        (["needles", "--length", "200", "--count", "33"], "--count is 33; it may be 1 to 32"),
        (["variables", "--length", "200", "--count", "0"], "--count is 0; it may be 1 to 32"),
        (["variables", "--length", "2000", "--hops", "-1"], "--hops is -1; it may be 0 to 32"),
        (["variables", "--length", "200", "--wording", "plain"], "ask for --task needle or --task needles"),
        (["variables", "--length", "90"], "--length 90 is too short: what is hidden takes"),
        (["riddles"], "'riddles' is not one of 'needle', 'needles', 'variables', 'perplexity'"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(arguments, sentence, document, capsys):
    assert main(["eval", TINY, "--document", document, "--task", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert sentence in err.replace("\n", " ")
    assert "Traceback" not in err


def test_a_picture_without_matplotlib_is_refused_before_anything_is_measured(monkeypatch, tmp_path):
    asked = Asked(task="needle", text="A.", length=(9,), depth=(0.0,))
    monkeypatch.setattr(output.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'ringctx\[plot\]'"):
        check_out(asked, tmp_path)
    check_out(asked, None)


def test_a_picture_of_needles_is_drawn(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    written: list[tuple[float, float, str]] = []
    monkeypatch.setattr(Axes, "text", lambda self, x, y, text, **_: written.append((x, y, text)))
    cost = {"seconds": 1.0, "density": 1.0, "bytes": 0, "prefill_seconds": 1.0, "answer_seconds": 0.0, "memory": [1], "anonymous": [1]}
    common = {"prompt_tokens": 9, "wording": "plain", **cost}

    def one(length: int, depth: float, seed: int) -> needle.NeedleRow:
        return needle.NeedleRow(length=length, depth=depth, correct=depth < 0.5 or seed > 1, number="1", answer="", seed=seed, **common)

    def several(length: int, seed: int) -> needle.NeedlesRow:
        needles = [needle.Found(name="", depth=d, number="1", answer="", correct=d * seed > 0.5) for d in (0.25, 0.75)]
        return needle.NeedlesRow(length=length, depth=None, correct=False, found=0.5, needles=needles, seed=seed, **common)

    once = Result(task="needle", rows=[one(length, depth, 0) for length in (512, 1024) for depth in (0.0, 1.0)], protocol="")
    files = report.write(once, tmp_path)
    assert [path.name for path in files] == ["needle.json", "needle.png"]
    assert files[1].read_bytes().startswith(b"\x89PNG")
    assert (once.accuracy, written) == (0.5, [])
    thrice = Result(task="needle", rows=[one(512, depth, seed) for depth in (0.0, 1.0) for seed in range(3)], protocol="")
    report.write(thrice, tmp_path)
    assert written == [(0, 0, "3/3"), (0, 1, "1/3")]
    many = Result(task="needles", rows=[several(length, seed) for length in (512, 1024) for seed in (1, 3)], protocol="")
    written.clear()
    assert [path.name for path in report.write(many, tmp_path)] == ["needles.json", "needles.png"]
    assert sorted(written) == [(0, 0, "1/2"), (0, 1, "2/2"), (1, 0, "1/2"), (1, 1, "2/2")]
    assert many.accuracy == 0.75
