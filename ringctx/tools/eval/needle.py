"""Needles: numbers hidden in a long text, asked for at its end; one at a depth, or several with names, from one reading."""

from __future__ import annotations

import random
from dataclasses import dataclass

from ringctx.runtime.answer import Listener
from ringctx.runtime.engine import Engine
from ringctx.tools.eval.asked import Row
from ringctx.tools.eval.asking import ask
from ringctx.tools.eval.planting import SLACK, Hidden, Question, plant
from ringctx.tools.eval.wordings import NAMES, WORDINGS

COMMON = (
    "in text that begins at a place drawn from seed and length. The prompt, with the model's chat template and the answer's "
    f"beginning, has `length` tokens, or up to {SLACK} fewer; prompt_tokens says how many. Correct: the answer begins with "
    "the number and no further digit; quotation marks and the like may come before it. density: from the patterns, of the prompt."
)
ONE = f"A number of five digits at the sentence end nearest to the depth (in characters), {COMMON}"
SEVERAL = (
    "{count} needles, each of a name and a number of five digits, at the sentence ends nearest to the depths asked for (in "
    "characters), which are the middles of {count} equal parts where none is, "
    f"{COMMON} The text is read once and each needle asked for from there; length and density are of the "
    "longest prompt. correct: all of them; found: the share."
)


@dataclass(frozen=True, kw_only=True)
class NeedleRow(Row):
    """A run with one needle."""

    prompt_tokens: int
    wording: str
    seed: int
    number: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Found:
    """What became of one needle among several."""

    name: str
    depth: float
    number: str
    answer: str
    correct: bool


@dataclass(frozen=True, kw_only=True)
class NeedlesRow(Row):
    """A run with several needles. found: the share of them; correct: all of them."""

    prompt_tokens: int
    wording: str
    seed: int
    found: float
    needles: list[Found]

    @property
    def tried(self) -> list[tuple[float | None, bool]]:
        """Depth and success of each needle."""
        return [(needle.depth, needle.correct) for needle in self.needles]


def hidden_one(wording: str, length: int, depth: float, seed: int) -> Hidden:
    """One needle without a name. Its number depends on all arguments."""
    number = str(random.Random(f"{wording} {seed} {length} {depth}").randint(10_000, 99_999))
    return _hidden(wording, [(depth, "", number)])


def middles(count: int) -> tuple[float, ...]:
    """The depths of the middles of so many equal parts."""
    return tuple((n + 0.5) / count for n in range(count))


def hidden_several(wording: str, length: int, depths: tuple[float, ...], seed: int) -> tuple[Hidden, list[tuple[float, str, str]]]:
    """A needle at each depth, ascending; also depth, name and number of each."""
    draw = random.Random(f"{wording} {seed} {length}")
    numbers = map(str, draw.sample(range(10_000, 100_000), len(depths)))
    needles = list(zip(depths, draw.sample(NAMES, len(depths)), numbers, strict=True))
    return _hidden(wording, [(depth, f" of {name}", number) for depth, name, number in needles]), needles


def run_one(engine: Engine, text: str, wording: str, length: int, depth: float, seed: int, listener: Listener) -> NeedleRow:
    """One needle. All ranks call it together and return the same but for the seconds."""
    planted = plant(engine, text, length, hidden_one(wording, length, depth, seed), seed)
    said = ask(engine, planted, listener)
    return NeedleRow(
        length=length,
        depth=depth,
        correct=said.are_correct[0],
        **said.cost,
        prompt_tokens=said.prompt_tokens,
        wording=wording,
        seed=seed,
        number=planted.questions[0].number,
        answer=said.answers[0],
    )


def run_several(
    engine: Engine, text: str, wording: str, length: int, depths: tuple[float, ...], seed: int, listener: Listener
) -> NeedlesRow:
    """Several needles, each asked for. All ranks call it together and return the same but for the seconds."""
    hidden, needles = hidden_several(wording, length, depths, seed)
    said = ask(engine, plant(engine, text, length, hidden, seed), listener)
    found = [
        Found(name=name, depth=depth, number=number, answer=answer, correct=is_correct)
        for (depth, name, number), answer, is_correct in zip(needles, said.answers, said.are_correct, strict=True)
    ]
    return NeedlesRow(
        length=length,
        depth=None,
        correct=all(said.are_correct),
        **said.cost,
        prompt_tokens=said.prompt_tokens,
        wording=wording,
        seed=seed,
        found=sum(said.are_correct) / len(depths),
        needles=found,
    )


def _hidden(wording: str, needles: list[tuple[float, str, str]]) -> Hidden:
    """Needles of depth, {of} and number in these words."""
    words = WORDINGS[wording]
    sentences = tuple((depth, words.needle.format(of=of, number=number)) for depth, of, number in needles)
    questions = tuple(Question(words.question.format(of=of), words.beginning.format(of=of), number) for _, of, number in needles)
    return Hidden(sentences, questions)
