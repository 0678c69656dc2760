"""Needle: a number hidden in a long text, asked for at its end."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from ringctx.errors import ConfigError
from ringctx.runtime.answer import Listener
from ringctx.runtime.engine import Engine
from ringctx.tools.eval.asked import Row
from ringctx.tools.eval.density import density

NEEDLE = "The special magic number is: {number}."
QUESTION = "What is the special magic number mentioned in the text above?"
BEGINNING = "The special magic number mentioned in the text is"
PROTOCOL = (
    "A number of five digits at the sentence end nearest to the depth (in characters), in text from a drawn place. The prompt, "
    "with the model's chat template and the answer's beginning, has `length` tokens, or up to {slack} fewer; prompt_tokens says "
    "how many. Correct: the number's digits begin the answer. seconds: prefill and answer. density: from the patterns, of the prompt."
)
ANSWER_TOKENS = 8
"""Enough for a space and five digits, however they are split."""
SLACK = 8
"""Tokens by which a prompt may be shorter than asked: one character more may be worth more than one token."""
SENTENCE_END = re.compile(r"[.!?](?=\s|\Z)")


@dataclass(frozen=True, kw_only=True)
class NeedleRow(Row):
    """A run. memory: each rank's peak in bytes up to now, so it never falls from one run to the next."""

    prompt_tokens: int
    number: str
    answer: str
    memory: list[int]


@dataclass(frozen=True)
class Planted:
    """A prompt of tokens, the text it was made from with the needle in it, and the number that is asked for."""

    prompt: list[int]
    text: str
    number: str


def run(engine: Engine, planted: Planted, length: int, depth: float, listener: Listener) -> NeedleRow:
    """Read, answer, compare. All ranks call it together and return the same but for `seconds`."""
    answer = engine.complete(planted.prompt, listener)
    return NeedleRow(
        length=length,
        depth=depth,
        correct=answer.answer.lstrip().startswith(planted.number),
        seconds=answer.seconds.prefill + answer.seconds.decode,
        density=density(engine, answer.prompt_tokens),
        bytes=sum(answer.bytes.values()),
        prompt_tokens=answer.prompt_tokens,
        number=planted.number,
        answer=answer.answer,
        memory=answer.memory,
    )


def plant(engine: Engine, text: str, length: int, depth: float, seed: int) -> Planted:
    """The prompt for one run, of `length` tokens or at most SLACK fewer; number and place depend on seed, length and depth alone.

    Raises ConfigError when the length has no room for the question, or asks for more text than there is.
    """
    draw = random.Random(f"{seed} {length} {depth}")
    number = str(draw.randint(10_000, 99_999))
    needle = NEEDLE.format(number=number)
    frame = len(_prompt(engine, needle))
    if frame > length:
        raise ConfigError(f"--length {length} is too short for a needle: it takes {frame} tokens with its question; ask for more.")
    sample = text[:20_000]
    ratio = len(sample) / len(engine.tokenizer(sample, add_special_tokens=False).input_ids)  # characters a token
    text = text[_start(text, draw, round(1.1 * ratio * (length - frame))) :]
    best, width = Planted(_prompt(engine, needle), needle, number), round(ratio * (length - frame))
    fits, over = 0, len(text) + 1  # characters that fit, and that do not
    while over - fits > 1 and len(best.prompt) < length:
        width = min(max(width, fits + 1), over - 1)
        around = hide(needle, text[:width], depth)
        prompt = _prompt(engine, around)
        if len(prompt) <= length:
            best, fits = Planted(prompt, around, number), width
        else:
            over = width
        width += round(ratio * (length - len(prompt)))
    if length - len(best.prompt) > SLACK:
        raise ConfigError(
            f"--length {length} needs more text than the document has: its {len(text):,} characters make a prompt of "
            f"{len(best.prompt):,} tokens. Give a longer --document, or ask for less."
        )
    return best


def hide(needle: str, text: str, depth: float) -> str:
    """The text with the needle at its beginning or after the end of a sentence, whichever is nearest to this share of it."""
    places = [0, *(found.end() for found in SENTENCE_END.finditer(text))]
    place = min(places, key=lambda at: abs(at - depth * len(text)))
    before, after = text[:place], text[place:]
    return before + " " * bool(before) + needle + " " * (bool(after) and not after[0].isspace()) + after


def _start(text: str, draw: random.Random, width: int) -> int:
    """Where some sentence begins that has `width` characters from there on; 0 where none has."""
    starts = [0, *(found.end() for found in re.finditer(r"[.!?]\s+", text[: max(len(text) - width, 0)]))]
    return draw.choice(starts)


def _prompt(engine: Engine, text: str) -> list[int]:
    """Text and question as the configuration frames them, and the answer's beginning, which the model continues."""
    space = "" if engine.tokenizer.chat_template else "\n"
    beginning = engine.tokenizer(space + BEGINNING, add_special_tokens=False).input_ids
    return [*engine.prompt(text, QUESTION), *beginning]
