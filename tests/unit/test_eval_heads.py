"""ringctx eval --task heads: heads are ranked by the scores that recall goes by, and those that see any sentence are left out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from ringctx.cli import main
from ringctx.config import Config, load, parse
from ringctx.core.ring import Ring
from ringctx.errors import ConfigError
from ringctx.runtime.answer import Listener
from ringctx.runtime.engine import Engine
from ringctx.runtime.recall import between, chosen, heard
from ringctx.tools.eval import heads
from ringctx.tools.eval.heads import Judged, best, blocks_of, found_and_control, hidden_each, listening, reciprocal
from ringctx.tools.eval.planting import SLACK, plant
from ringctx.tools.eval.wordings import TO_TUNE

pytestmark = pytest.mark.usefixtures("own_cache")

TINY = str(Path(__file__).parents[2] / "configs" / "tiny_cpu.yaml")
TEXT = " ".join(f"Verse {n} says that the number of waters is {n * n} and no more." for n in range(60))
RECALL = "cache.recall={block: 16, margin: 0, sinks: 20, recent: 30}"
PINNED = ["length", "depth", "correct", "seconds", "density", "bytes", "prefill_seconds", "answer_seconds", "memory", "anonymous"]


def engine(*overrides: str) -> Engine:
    return Engine.load(listening(parse("model: {path: random-tiny, dtype: float32, device: cpu}", [RECALL, *overrides])), Ring.alone())


@pytest.fixture
def document(tmp_path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


# -- ranking ------------------------------------------------------------------------------------------------------------


def test_a_head_that_finds_is_told_from_one_that_sees_any_sentence_and_from_one_that_finds_nothing():
    sentences = [range(1, 2), range(3, 5)]  # the second lies across a border
    finds, sees, blind = 0, 1, 2
    first = torch.tensor([[0.0, 0.9, 0.3, 0.0, 0.1, 0.2], [0.0, 0.9, 0.0, 0.0, 0.8, 0.1], [0.9, 0.1, 0.8, 0.2, 0.3, 0.7]])
    second = torch.tensor([[0.4, 0.3, 0.2, 0.8, 0.7, 0.5], [0.0, 0.9, 0.0, 0.8, 0.0, 0.1], [0.9, 0.1, 0.8, 0.2, 0.3, 0.7]])
    places = torch.stack([reciprocal(scores, sentences) for scores in (first, second)])
    assert places[:, finds].tolist() == [[1, 1 / 4], [1 / 5, 1]]
    assert places[:, sees].tolist() == [[1, 1 / 2], [1, 1 / 2]]
    assert places[:, blind].tolist() == [[1 / 6, 1 / 4], [1 / 6, 1 / 4]]
    found, control = (values.tolist() for values in found_and_control(places))
    assert found == pytest.approx([1, 3 / 4, 5 / 24])
    assert control == pytest.approx([9 / 40, 3 / 4, 5 / 24])
    judged = [Judged(2, head, *means) for head, *means in zip((finds, sees, blind), found, control, strict=True)]
    assert best(judged, 1) == [[2, finds]]


def test_control_is_the_mean_over_all_other_questions():
    places = torch.rand(3, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found, control = found_and_control(places)
    for head in range(2):
        of_head = places[:, head]
        assert float(found[head]) == pytest.approx(float(of_head.trace()) / 3)
        assert float(control[head]) == pytest.approx((float(of_head.sum()) - float(of_head.trace())) / 6)


def test_ties_go_to_the_earlier_block_layer_and_head():
    assert reciprocal(torch.tensor([[0.5, 0.5, 0.5]]), [range(1, 2), range(2, 3), range(1)]).tolist() == [[1 / 2, 1 / 3, 1]]
    equal = [Judged(layer, head, 0.75, 0.25) for layer in (0, 1) for head in (0, 1)]
    assert best([Judged(0, 0, 0.5, 0.25), *equal[1:]], 2) == [[0, 1], [1, 0]]
    assert best([*equal[:3], Judged(1, 1, 1.0, 0.25)], 2) == [[0, 0], [1, 1]]


# -- what is read and ranked --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "seed"), [(1000, 0), (1203, 1), (1777, 2)])
def test_the_blocks_of_a_sentence_are_the_least_that_hold_it(length, seed):
    ours = engine()
    hidden = hidden_each(TO_TUNE, length, seed)
    planted = plant(ours, TEXT, length, hidden, seed)
    assert length - SLACK <= max(map(len, planted.prompts)) <= length
    opening = ours.prompts.opening(planted.text)
    middle = between(ours.config.cache.recall, len(opening))
    assert [sentence in planted.text for _, sentence in hidden.sentences] == [True] * len(TO_TUNE)
    for _, sentence in hidden.sentences:
        blocks = blocks_of(ours, planted.text, opening, sentence)
        begin, end = middle.start + 16 * blocks.start, middle.start + 16 * blocks.stop
        assert sentence in ours.tokenizer.decode(opening[begin:end])
        assert sentence not in ours.tokenizer.decode(opening[begin + 16 : end])
        assert sentence not in ours.tokenizer.decode(opening[begin : end - 16])


def test_a_head_ranks_first_the_block_that_recall_chooses_by_it():
    ours = engine("layout.chunk=300", "attention.window=64", "attention.sinks=4")
    wordings, seen = ("plain", "diary", "passkey"), []
    planted = plant(ours, TEXT, 1000, hidden_each(wordings, 1000, 0), 0)
    opening = ours.prompts.opening(planted.text)
    middle = between(ours.config.cache.recall, len(opening))
    every = [range(n, n + 1) for n in range(-(-len(middle) // 16))]
    places, num_blocks = heads._listen(ours, planted, every, Listener())
    assert places.shape == (3, 8, num_blocks)
    reading = ours.read(opening)
    for question, prompt in enumerate(planted.prompts):
        for head in range(8):
            one = replace(ours.config.cache, recall=replace(ours.config.cache.recall, heads=(divmod(head, 4),), blocks=1))
            with ours.context.recalling():
                asking = heard(one, ours.model, ours.context, reading.cache, prompt[len(opening) :])
            kept = {i for r in chosen(one.recall, asking, reading.cache, ours.ring) for i in r if i in middle}
            first = int(places[question, head].argmax())
            assert float(places[question, head, first]) == 1
            assert kept == set(middle[16 * first : 16 * first + 16])
            seen.append(first)
    assert len(set(seen)) > 3
    assert not ours.context.recalled
    assert ours.context.asked is None


def test_seeds_move_sentences_and_nothing_else_does():
    ours = engine()
    a, again, b = (heads.run(ours, TEXT, ("plain", "diary", "letter"), 900, seed, Listener()) for seed in (0, 0, 1))
    assert torch.equal(a[1], again[1])
    assert torch.equal(a[2], again[2])
    assert not torch.equal(a[1], b[1])
    assert a[0].wordings != b[0].wordings
    assert sorted(a[0].wordings) == sorted(b[0].wordings)


# -- the command --------------------------------------------------------------------------------------------------------


def test_eval_names_heads_that_a_configuration_takes(capsys, document, tmp_path):
    pytest.importorskip("matplotlib")
    typed = ["eval", TINY, "--task", "heads", "--document", document, "--length", "1200", "--count", "3", "--seed", "0", "--seed", "4"]
    typed += ["--set", RECALL, "--out", str(tmp_path / "out")]
    assert main([*typed, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result) == ["task", "rows", "accuracy", "protocol", "heads", "chosen"]
    assert all(list(row) == [*PINNED, "prompt_tokens", "seed", "wordings", "blocks"] for row in result["rows"])
    assert [row["seed"] for row in result["rows"]] == [0, 4]
    assert all(sorted(row["wordings"]) == sorted(TO_TUNE) for row in result["rows"])
    assert [(one["layer"], one["head"]) for one in result["heads"]] == [(layer, head) for layer in (0, 1) for head in range(4)]
    assert all(list(one) == ["layer", "head", "found", "control"] and 0 < one["found"] <= 1 for one in result["heads"])
    gains = {(one["layer"], one["head"]): one["found"] - one["control"] for one in result["heads"]}
    assert result["chosen"] == sorted(map(list, sorted(gains, key=lambda head: -gains[head])[:3]))
    assert json.loads((tmp_path / "out" / "heads.json").read_text()) == result
    assert (tmp_path / "out" / "heads.png").read_bytes().startswith(b"\x89PNG")
    assert main(typed) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    pasted = parse(f"cache:\n  recall:\n    blocks: 1\n    {line}\n")
    assert [list(head) for head in pasted.cache.recall.heads] == result["chosen"]


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        ([], "needs --length N"),
        (["--length", "900", "--depth", "0.5"], "--depth means nothing to --task heads"),
        (["--length", "900", "--wording", "diary", "--wording", "diary"], "--wording diary is but one; give two or more"),
        (["--length", "900", "--count", "9", "--set", RECALL], "--count is 9, but the model has 8 heads"),
        (["--length", "700"], "in the first 64 or last 256 of"),
        (["--length", "900", "--set", "cache.evict={kind: streaming}"], "but cache.evict.kind is streaming; add --set 'cache.evict={}'"),
        (["--length", "900", "--set", "model.tensor_parallel=2"], "but model.tensor_parallel is 2"),
    ],
)
def test_what_cannot_be_judged_is_refused(typed, sentence, document, capsys):
    assert main(["eval", TINY, "--task", "heads", "--document", document, *typed]) == 2
    assert sentence in capsys.readouterr().err.replace("\n", " ")


def test_heads_that_were_named_do_not_narrow_the_search():
    config = load(TINY, ["cache.recall={blocks: 2, heads: [[1, 1]]}"])
    assert listening(config) == replace(config, cache=replace(config.cache, recall=replace(config.cache.recall, heads=())))
    with pytest.raises(ConfigError, match=r"compares every key"):
        listening(parse("cache: {evict: {kind: h2o}}"))
    assert isinstance(listening(Config()), Config)
