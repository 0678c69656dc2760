"""ringctx eval, what is hidden in texts: where needles and variables lie, what is asked of them, and what counts as an answer."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

transformers = pytest.importorskip("transformers")

from ringctx.config import parse  # noqa: E402
from ringctx.core.ring import Ring  # noqa: E402
from ringctx.runtime import engine as runtime_engine  # noqa: E402
from ringctx.runtime.answer import Listener  # noqa: E402
from ringctx.runtime.engine import Engine  # noqa: E402
from ringctx.runtime.prompts import common  # noqa: E402
from ringctx.tools.eval import needle, variables  # noqa: E402
from ringctx.tools.eval.asking import ask  # noqa: E402
from ringctx.tools.eval.planting import SLACK, Hidden, Planted, Question, hide, is_number, plant  # noqa: E402
from ringctx.tools.eval.wordings import NAMES, WORDINGS  # noqa: E402

pytestmark = pytest.mark.usefixtures("own_cache")

TEXT = " ".join(f"Verse {n} says that the number of waters is {n * n} and no more." for n in range(60))
PLAIN = WORDINGS["plain"]


def engine(*overrides: str) -> Engine:
    return Engine.load(parse("model: {path: random-tiny, dtype: float32, device: cpu}", overrides), Ring.alone())


def planted_one(ours: Engine, length: int, depth: float, seed: int, wording: str = "plain") -> Planted:
    return plant(ours, TEXT, length, needle.hidden_one(wording, length, depth, seed), seed)


# -- where they lie -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("length", [200, 333, 1024])
def test_a_needle_lies_at_its_depth_in_a_prompt_of_the_asked_length(length, depth):
    ours = engine()
    planted = planted_one(ours, length, depth, seed=3)
    (tokens,), (question,) = planted.prompts, planted.questions
    assert length - SLACK <= len(tokens) <= length
    prompt = ours.tokenizer.decode(tokens)
    sentence = f"The special magic number is: {question.number}."
    assert prompt.count(question.number) == 1
    asked = "What is the special magic number mentioned in the text above?"
    assert prompt == f"<|user|>{planted.text}\n\n{asked}<|model|>The special magic number mentioned in the text is"
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
    ending = made.encode(PLAIN.beginning.format(of="")).ids[2:]
    for length in range(160, 480, 7):
        (prompt,) = planted_one(ours, length, 0.5, seed=length).prompts
        assert length - SLACK <= len(prompt) <= length
        assert prompt[-len(ending) :] == ending


def test_numbers_depend_on_everything_and_places_on_seed_and_length():
    ours = engine()
    cases = [(300, 0.5, 0, "plain"), (300, 0.5, 1, "plain"), (300, 0.0, 0, "plain"), (301, 0.5, 0, "plain"), (300, 0.5, 0, "diary")]
    made = {case: planted_one(ours, *case) for case in cases}
    assert len({planted.questions[0].number for planted in made.values()}) == len(cases)
    assert made[cases[0]] == planted_one(ours, *cases[0])


def test_needles_of_one_length_and_seed_share_the_text_before_the_first():
    ours = engine()
    prompts = [planted_one(ours, 1000, depth, seed=2) for depth in (0.3, 0.6, 0.9)]
    for early, late in zip(prompts, prompts[1:], strict=False):
        at = early.text.index("The special magic number")
        assert 0.2 < at / len(early.text)
        assert early.text[:at] == late.text[:at]
        assert common(*(next(planted.prompts) for planted in (early, late))) >= at  # of a tokenizer of bytes


@settings(max_examples=50, deadline=None)
@given(some.text(alphabet="ab .!\n", max_size=60), some.floats(0, 1))
def test_hiding_keeps_the_text_and_takes_the_nearest_sentence_end(text, depth):
    before, _, after = hide(((depth, "NEEDLE"),), text).partition("NEEDLE")
    before = before[:-1]  # the space that was added
    assert text.startswith(before)
    assert text[len(before) :] in (after, after[1:])
    ends = [at for at in range(1, len(text) + 1) if text[at - 1] in ".!" and not text[at : at + 1].strip()]
    assert len(before) in (0, *ends)
    assert abs(len(before) - depth * len(text)) == min(abs(at - depth * len(text)) for at in (0, *ends))


@settings(max_examples=50, deadline=None)
@given(some.text(alphabet="ab .!\n", max_size=60), some.lists(some.floats(0, 1), max_size=5).map(sorted))
def test_hiding_several_keeps_their_order_and_each_where_it_would_lie_alone(text, depths):
    sentences = tuple((depth, f"<{n}>") for n, depth in enumerate(depths))
    made = hide(sentences, text)
    assert [int(n) for n in re.findall(r"<(\d)>", made)] == list(range(len(depths)))
    assert re.sub(r"\s|<\d>", "", made) == re.sub(r"\s", "", text)
    for one in sentences:
        alone, both = (re.sub(rf"\s|<[^{one[1][1]}]>", "", x).partition(one[1])[0] for x in (hide((one,), text), made))
        assert alone == both


# -- what is asked ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wording", WORDINGS)
def test_every_wording_says_its_number_and_asks_for_it_by_name_where_there_are_several(wording):
    hidden, needles = needle.hidden_several(wording, 1000, needle.middles(4), seed=1)
    assert [depth for depth, _, _ in needles] == [0.125, 0.375, 0.625, 0.875]
    assert len({name for _, name, _ in needles} & set(NAMES)) == len({number for *_, number in needles}) == 4
    for (_, name, number), (_, sentence), question in zip(needles, hidden.sentences, hidden.questions, strict=True):
        assert number in sentence
        assert sentence[-1] == "."
        assert f" of {name}" in sentence
        assert f" of {name}" in question.text
        assert f" of {name}" in question.beginning
        assert question.number == number
        assert number not in question.text + question.beginning
    one = needle.hidden_one(wording, 1000, 0.5, seed=1)
    assert not any(name in str(one) or "{" in str(one) for name in NAMES)


def test_there_are_five_wordings_or_more_and_no_two_share_a_sentence():
    assert len(WORDINGS) >= 5
    for part in ("needle", "question", "beginning"):
        assert len({getattr(words, part) for words in WORDINGS.values()}) == len(WORDINGS)


@pytest.mark.parametrize("seed", range(20))
def test_plain_assignments_ask_for_the_last_number_given(seed):
    made = variables.program(3, 0, 500, seed)
    assert len(made.statements) == 6
    assert len({number for *_, number in made.statements}) == 6
    assert [depth for depth, *_ in made.statements] == sorted(depth for depth, *_ in made.statements)
    assigned = [(depth, number) for depth, name, number in made.statements if name == made.asked]
    assert assigned[-1] == (made.depth, made.number)
    sentences = [sentence for _, sentence in made.hidden.sentences]
    assert sentences[0] == f"The value of {made.statements[0][1]} is now {made.statements[0][2]}."


@pytest.mark.parametrize("hops", [1, 3])
@pytest.mark.parametrize("seed", range(10))
def test_chains_hand_a_number_on_in_order(hops, seed):
    made = variables.program(3, hops, 500, seed)
    assert len(made.statements) == 3 * (hops + 1) == len({name for _, name, _ in made.statements})
    values: dict[str, tuple[str, int]] = {}  # number, and how often it was handed on
    for _, name, value in made.statements:
        values[name] = (value, 0) if value.isdigit() else (values[value][0], values[value][1] + 1)
    assert values[made.asked] == (made.number, hops)
    assert sorted(steps for _, steps in values.values()) == sorted([*range(hops + 1)] * 3)
    copied = next((name, value) for _, name, value in made.statements if not value.isdigit())
    assert "The value of {} is now that of {}.".format(*copied) in [sentence for _, sentence in made.hidden.sentences]


def test_programs_differ_by_seed_and_mix_their_chains():
    made = [variables.program(3, 1, 500, seed) for seed in range(20)]
    assert len({program.number for program in made}) == 20
    order = {tuple(value.isdigit() for *_, value in program.statements) for program in made}
    assert len(order) > 1


# -- what counts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "is_correct"),
    [(" 12345.", True), ("\n12345", True), ("12345", True), (' "12345" ', True), (" a 12345", False), (" 1234", False), (" 123456", False)],
)
def test_correct_when_the_answer_begins_with_the_number_alone(monkeypatch, said, is_correct):
    assert is_number(said, "12345") is is_correct
    ours = engine("generation.max_new_tokens=8")
    tokens = ours.tokenizer(said).input_ids
    monkeypatch.setattr(runtime_engine.Sampler, "choose", lambda self, _: tokens.pop(0) if tokens else 0)
    said_all = ask(ours, Planted(list(range(3, 59)), ([59],), "", (Question("", "", "12345"),)), Listener())
    assert said_all.are_correct == [is_correct]
    assert said_all.answers[0].strip() == said.strip()
    assert said_all.prompt_tokens == 57
    assert said_all.cost["density"] == 1.0
    assert said_all.cost["bytes"] == 0
    assert len(said_all.cost["memory"]) == len(said_all.cost["anonymous"]) == 1


@pytest.mark.parametrize("overrides", [(), ("layout.chunk=64", "cache.storage=int8", "cache.page=16")], ids=str)
def test_questions_about_one_reading_are_answered_as_if_each_were_alone(overrides, monkeypatch):
    ours = engine("generation.max_new_tokens=8", *overrides)
    hidden, _ = needle.hidden_several("letter", 900, (0.1, 0.5, 0.98), seed=0)
    planted = plant(ours, TEXT, 900, hidden, seed=0)
    assert 900 - SLACK <= max(map(len, planted.prompts)) <= 900
    read: list[int] = []
    began = Listener(began=lambda tokens, _: read.append(tokens))
    said = ask(ours, planted, began)
    assert sum(read) < 1.6 * 900  # one text and three questions
    assert said.answers == [ours.complete(prompt, num_read=len(planted.opening)).answer for prompt in planted.prompts]
    assert said.prompt_tokens == max(map(len, planted.prompts))


def test_a_text_without_sentences_takes_what_is_hidden_at_its_beginning():
    hidden = Hidden(((0.5, "N 1."), (0.9, "M 2.")), (Question("?", "A", "1"),))
    assert hide(hidden.sentences, "no end here") == "N 1. M 2. no end here"
