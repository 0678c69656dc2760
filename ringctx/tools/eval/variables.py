"""Variables: assignments hidden in a long text; at its end one variable's value is asked for."""

from __future__ import annotations

import random
from dataclasses import dataclass

from ringctx.runtime.answer import Listener
from ringctx.runtime.engine import Engine
from ringctx.tools.eval.asked import Row
from ringctx.tools.eval.asking import ask
from ringctx.tools.eval.planting import SLACK, Hidden, Question, plant

LETTERS = "BCDFGHJKLMNPQRSTVWXZ"
SET, COPY = "The value of {name} is now {value}.", "The value of {name} is now that of {value}."
QUESTION = "What is the value of {name} at the end of the text above?"
BEGINNING = "At the end of the text above, the value of {name} is now"
PLAIN = (
    "Plain assignment: {count} variables and twice as many assignments, each to a variable drawn uniformly, of a number of "
    "five digits that no other has; one variable among those assigned is asked for, and the last number it was given "
    "counts."
)
CHAINS = (
    "Chains: {count} numbers of five digits are each given to a variable and handed on {hops} times, each time to a new "
    "variable; the statements of a chain are in order, those of different chains mixed. The last variable of a drawn chain "
    "is asked for, and its number counts."
)
COMMON = (
    "Names are three consonants. Statements lie at the sentence ends nearest to drawn depths (in characters); depth says "
    "where the one lies that gave the asked variable its value. The prompt, with the model's chat template and the answer's "
    f"beginning, has `length` tokens, or up to {SLACK} fewer. Correct: the answer begins with the number and no further "
    "digit. density: from the patterns, of the prompt."
)


@dataclass(frozen=True, kw_only=True)
class VariablesRow(Row):
    """A run. depth: of the statement that gave the variable its value."""

    prompt_tokens: int
    seed: int
    variable: str
    number: str
    answer: str


@dataclass(frozen=True)
class Program:
    """statements: depth, variable and what it is given, a number or another variable, in order. asked: a variable. number: its value."""

    statements: tuple[tuple[float, str, str], ...]
    asked: str
    number: str

    @property
    def depth(self) -> float:
        """Of the statement that gave the asked variable its value."""
        return next(depth for depth, name, _ in reversed(self.statements) if name == self.asked)

    @property
    def hidden(self) -> Hidden:
        """As sentences and a question."""
        sentences = tuple((at, (SET if to.isdigit() else COPY).format(name=name, value=to)) for at, name, to in self.statements)
        return Hidden(sentences, (Question(QUESTION.format(name=self.asked), BEGINNING.format(name=self.asked), self.number),))


def protocol(count: int, hops: int) -> str:
    """What these figures mean."""
    return f"{(CHAINS if hops else PLAIN).format(count=count, hops=hops)} {COMMON}"


def program(count: int, hops: int, length: int, seed: int) -> Program:
    """Plain assignments (no hops) or chains, drawn from all arguments."""
    draw = random.Random(f"{seed} {length} {count} {hops}")
    names = draw.sample([a + b + c for a in LETTERS for b in LETTERS for c in LETTERS], count * (hops + 1))
    pairs = _chains(names, hops, draw) if hops else _plain(names, draw)
    depths = sorted(draw.random() for _ in pairs)
    asked = draw.choice(names[hops :: hops + 1] if hops else sorted({name for name, _ in pairs}))
    given = dict(pairs)  # the last assignment of each
    number = given[asked]
    while not number.isdigit():
        number = given[number]
    return Program(tuple((depth, *pair) for depth, pair in zip(depths, pairs, strict=True)), asked, number)


def run(engine: Engine, text: str, length: int, count: int, hops: int, seed: int, listener: Listener) -> VariablesRow:
    """Read, answer, compare. All ranks call it together and return the same but for the seconds."""
    made = program(count, hops, length, seed)
    said = ask(engine, plant(engine, text, length, made.hidden, seed), listener)
    return VariablesRow(
        length=length,
        depth=made.depth,
        correct=said.are_correct[0],
        **said.cost,
        prompt_tokens=said.prompt_tokens,
        seed=seed,
        variable=made.asked,
        number=made.number,
        answer=said.answers[0],
    )


def _plain(names: list[str], draw: random.Random) -> list[tuple[str, str]]:
    numbers = draw.sample(range(10_000, 100_000), 2 * len(names))
    return [(draw.choice(names), str(number)) for number in numbers]


def _chains(names: list[str], hops: int, draw: random.Random) -> list[tuple[str, str]]:
    """Chain n has the names from n (hops + 1) on; each is given the one before, the first a number."""
    size = hops + 1
    numbers = map(str, draw.sample(range(10_000, 100_000), len(names) // size))
    chains = [names[a : a + size] for a in range(0, len(names), size)]
    waiting = [iter(zip(chain, (number, *chain), strict=False)) for chain, number in zip(chains, numbers, strict=True)]
    turns = [n for n in range(len(chains)) for _ in range(size)]
    draw.shuffle(turns)
    return [next(waiting[n]) for n in turns]
