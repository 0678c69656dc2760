"""Planting: sentences hidden in a long text, the questions about them, and the prompts of an exact length that ask these."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from ringctx.errors import ConfigError
from ringctx.runtime.engine import Engine

SLACK = 8
"""Tokens by which a prompt may be shorter than asked: one character more may be worth more than one token."""
SENTENCE_END = re.compile(r"[.!?](?=\s|\Z)")


@dataclass(frozen=True)
class Question:
    """What is asked, the beginning of the answer, which the model continues, and the number that continues it."""

    text: str
    beginning: str
    number: str


@dataclass(frozen=True)
class Hidden:
    """sentences: depth (0 first, 1 last) and text of each, in ascending order of depth. questions: at least one."""

    sentences: tuple[tuple[float, str], ...]
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Planted:
    """A text with the sentences in it, and the prompts made from it: tokens that all share, then those of each question."""

    opening: list[int]
    rests: tuple[list[int], ...]
    text: str
    questions: tuple[Question, ...]

    @property
    def prompts(self) -> Iterator[list[int]]:
        """The whole prompts, one at a time."""
        return ([*self.opening, *rest] for rest in self.rests)


def plant(engine: Engine, text: str, length: int, hidden: Hidden, seed: int) -> Planted:
    """Prompts of which the longest has `length` tokens or at most SLACK fewer. Where in the text they begin depends on seed and
    length alone, so what is before the first sentence hidden is the same wherever that lies.

    Raises ConfigError when the length has no room for sentences and question, or asks for more text than there is.
    """
    alone = hide(hidden.sentences, "")
    longest = max(hidden.questions, key=lambda question: len(_prompt(engine, alone, question)))
    frame = len(_prompt(engine, alone, longest))
    if frame > length:
        raise ConfigError(f"--length {length} is too short: what is hidden takes {frame} tokens with its question; ask for more.")
    sample = text[:20_000]
    ratio = len(sample) / len(engine.tokenizer(sample, add_special_tokens=False).input_ids)  # characters a token
    text = text[_start(text, random.Random(f"{seed} {length}"), round(1.1 * ratio * length)) :]
    best, num_tokens, width = alone, frame, round(ratio * (length - frame))
    fits, over = 0, len(text) + 1  # characters that fit, and that do not
    while over - fits > 1 and num_tokens < length:
        width = min(max(width, fits + 1), over - 1)
        around = hide(hidden.sentences, text[:width])
        taken = len(_prompt(engine, around, longest))
        if taken <= length:
            best, num_tokens, fits = around, taken, width
        else:
            over = width
        width += round(ratio * (length - taken))
    if length - num_tokens > SLACK:
        raise ConfigError(
            f"--length {length} needs more text than the document has: its {len(text):,} characters make a prompt of "
            f"{num_tokens:,} tokens. Give a longer --document, or ask for less."
        )
    opening = engine.prompts.opening(best)
    rests = tuple(_prompt(engine, best, question)[len(opening) :] for question in hidden.questions)
    return Planted(opening, rests, best, hidden.questions)


def hide(sentences: tuple[tuple[float, str], ...], text: str) -> str:
    """The text with each sentence at its beginning or after the end of one of its own, whichever is nearest to the depth's share."""
    places = [0, *(found.end() for found in SENTENCE_END.finditer(text))]
    length = len(text)
    for depth, sentence in reversed(sentences):  # from the last on: places before it stay what they are
        place = min(places, key=lambda at: abs(at - depth * length))
        before, after = text[:place], text[place:]
        text = before + " " * bool(before) + sentence + " " * (bool(after) and not after[0].isspace()) + after
    return text


def is_number(answer: str, number: str) -> bool:
    """True when the answer begins with this number and no further digit; spaces, quotation marks and the like may come before it."""
    found = re.match(r"\W*(\d+)", answer)
    return found is not None and found[1] == number


def _start(text: str, draw: random.Random, width: int) -> int:
    """Where some sentence begins that has `width` characters from there on; 0 where none has."""
    starts = [0, *(found.end() for found in re.finditer(r"[.!?]\s+", text[: max(len(text) - width, 0)]))]
    return draw.choice(starts)


def _prompt(engine: Engine, text: str, question: Question) -> list[int]:
    """Text and question as the configuration frames them, and the answer's beginning."""
    space = "" if engine.tokenizer.chat_template else "\n"
    beginning = engine.tokenizer(space + question.beginning, add_special_tokens=False).input_ids
    return [*engine.prompts.whole(text, question.text), *beginning]
