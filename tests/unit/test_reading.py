"""A document is read once and asked many times: each answer is that of a document read for it alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

from ringctx.config import parse
from ringctx.core.ring import Ring
from ringctx.errors import ConfigError
from ringctx.runtime.engine import Engine
from ringctx.runtime.storage import KINDS

pytestmark = pytest.mark.usefixtures("own_cache")

DOCUMENT = "In the beginning God created the heaven and the earth. " * 2
QUESTIONS = ("Who?", "What did he create?", "?", " Where", "\nWhen", "")


def engine(*overrides: str) -> Engine:
    return Engine.load(parse("model: {path: random-tiny, dtype: float32, device: cpu}", overrides), Ring.alone())


@pytest.mark.parametrize("storage", KINDS)
@pytest.mark.parametrize("setting", ["layout.chunk=null", "layout.chunk=32", "attention.positions={kind: yarn, factor: 2}"])
def test_answers_of_one_reading_are_those_of_a_reading_each(storage, setting):
    ours = engine(f"cache.storage={storage}", "cache.page=16", "generation.max_new_tokens=20", setting)
    reading = ours.read(ours.prompts.opening(DOCUMENT))
    before = [x.clone() for layer in range(2) for x in reading.cache.read(layer)]
    for question in (*QUESTIONS, *QUESTIONS[:2]):
        prompt = ours.prompts.whole(DOCUMENT, question)
        assert prompt == reading.tokens + ours.prompts.ending(DOCUMENT, question)
        assert ours.answer(reading, prompt).tokens == ours.generate(DOCUMENT, question).tokens
    after = [x for layer in range(2) for x in reading.cache.read(layer)]
    assert all(map(torch.equal, before, after))
    assert reading.cache.layout.length == len(reading.tokens)


def test_an_answer_that_breaks_off_leaves_the_reading_as_it_was(monkeypatch):
    ours = engine("generation.max_new_tokens=5")
    reading = ours.read(ours.prompts.opening(DOCUMENT))
    prompt = ours.prompts.whole(DOCUMENT, "Who?")
    want = ours.answer(reading, prompt).tokens
    with monkeypatch.context() as patch:
        patch.setattr(ours, "_step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ours.answer(reading, prompt)
    assert ours.answer(reading, prompt).tokens == want


def test_each_answer_may_be_chosen_otherwise():
    ours = engine("generation.max_new_tokens=5")
    reading, prompt = ours.read(ours.prompts.opening(DOCUMENT)), ours.prompts.whole(DOCUMENT, "Who?")
    longer = replace(ours.config.generation, max_new_tokens=9, temperature=1.0, seed=4)
    want = engine("generation.max_new_tokens=9", "generation.temperature=1.0", "generation.seed=4").generate(DOCUMENT, "Who?").tokens
    assert ours.answer(reading, prompt, generation=longer).tokens == want
    assert len(ours.answer(reading, prompt).tokens) == 5


def test_an_answer_counts_its_own_cost_and_a_whole_run_both():
    ours = engine("generation.max_new_tokens=2")
    reading, prompt = ours.read(ours.prompts.opening(DOCUMENT)), ours.prompts.whole(DOCUMENT, "Who?")
    one = ours.answer(reading, prompt)
    assert one.prompt_tokens == len(prompt)
    assert one.tokens_per_second["prefill"] == pytest.approx((len(prompt) - len(reading.tokens)) / one.seconds.prefill)
    whole = ours.generate(DOCUMENT, "Who?")
    assert whole.tokens_per_second["prefill"] == pytest.approx(len(prompt) / whole.seconds.prefill)


@pytest.mark.parametrize("prompt", [[], [5, 5, 5], None])
def test_a_prompt_that_begins_otherwise_is_refused(prompt):
    ours = engine()
    reading = ours.read(ours.prompts.opening(DOCUMENT))
    with pytest.raises(ConfigError, match=f"does not begin with the {len(reading.tokens)} tokens that were read, or adds none to them"):
        ours.answer(reading, reading.tokens if prompt is None else prompt)
