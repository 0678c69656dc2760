"""Heads: which heads of a model find what a question asks for, those that `cache.recall.heads` should name.

A sentence of each wording is hidden in one text, which is read once. For each question every head ranks the blocks of the text by
the score that `cache.recall` gives them. A head is good that ranks a sentence first for its own question and not for the others':
heads that see that a sentence is unlike the rest rank it alike for all of them.
Source: retrieval heads (Wu et al. 2024, arXiv 2404.15574), found here by scores of blocks and not by copied tokens.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ringctx.config import Config
from ringctx.errors import ConfigError
from ringctx.runtime.answer import Listener
from ringctx.runtime.engine import Engine
from ringctx.runtime.prompts import common
from ringctx.runtime.recall import between, heads_of, heard, ranked, shares
from ringctx.tools.eval.asked import Result, Row
from ringctx.tools.eval.asking import ANSWER_TOKENS
from ringctx.tools.eval.cost import counted
from ringctx.tools.eval.needle import hidden_one, middles
from ringctx.tools.eval.planting import SLACK, Hidden, Planted, plant

PROTOCOL = (
    "A sentence of each of {wordings} wordings, with a number of five digits, in an order drawn from seed and length, at the "
    "sentence ends nearest to the middles of {wordings} equal parts, in text that begins at a place drawn from seed and length. "
    f"The longest prompt has `length` tokens, or up to {SLACK} fewer. "
    "The text is read once; for each question every head ranks its blocks of {block} tokens, all but the first {sinks} and last "
    "{recent} tokens, by the score of cache.recall. found: the mean over sentences and seeds of 1 / the place of the sentence's "
    "best block, for its own question; control: the same for the questions of the other sentences. Chosen: the {count} heads "
    "with the largest found - control, at a tie the earlier layer and head."
)


@dataclass(frozen=True, kw_only=True)
class HeadsRow(Row):
    """A reading. wordings: in the order in which their sentences lie. blocks: how many were ranked."""

    prompt_tokens: int
    seed: int
    wordings: list[str]
    blocks: int


@dataclass(frozen=True)
class Judged:
    """A query head of a layer. found, control: mean reciprocal ranks of sentences for their own question, and for the others'."""

    layer: int
    head: int
    found: float
    control: float

    @property
    def gain(self) -> float:
        """By which heads are chosen."""
        return self.found - self.control


@dataclass(frozen=True, kw_only=True)
class HeadsResult(Result):
    """heads: all of the model's, by layer and head. chosen: the best of them, each [layer, head], in the same order."""

    heads: Sequence[Judged]
    chosen: list[list[int]]

    def json(self) -> dict[str, Any]:
        """As plain lists and mappings; the keys are pinned by a test."""
        return super().json() | {"heads": [asdict(head) for head in self.heads], "chosen": self.chosen}


def listening(config: Config) -> Config:
    """The configuration with all heads listened to. Raises ConfigError where keys or heads are not all there."""
    evict, parts = config.cache.evict.kind, config.model.tensor_parallel
    for is_set, name, instead in (
        (evict != "none", f"cache.evict.kind is {evict}", "--set 'cache.evict={}'"),
        (parts > 1, f"model.tensor_parallel is {parts}", "--set model.tensor_parallel=1"),
    ):
        if is_set:
            raise ConfigError(f"--task heads compares every key for every head on each rank, but {name}; add {instead}.")
    return replace(config, cache=replace(config.cache, recall=replace(config.cache.recall, heads=())))


def run(engine: Engine, text: str, wordings: Sequence[str], length: int, seed: int, listener: Listener) -> tuple[HeadsRow, Tensor, Tensor]:
    """A reading: its row, and found and control of each head, (heads) each.

    All ranks call it together and return the same but for the seconds. engine: of a configuration made by `listening`.
    """
    order = random.Random(f"{seed} {length}").sample(list(wordings), len(wordings))
    hidden = hidden_each(order, length, seed)
    planted = plant(engine, text, length, hidden, seed)
    opening = planted.opening
    sentences = [blocks_of(engine, planted.text, opening, sentence) for _, sentence in hidden.sentences]
    (places, blocks), cost = counted(engine, partial(_listen, engine, planted, sentences, listener))
    row = HeadsRow(
        length=length,
        depth=None,
        correct=None,
        **cost,
        prompt_tokens=len(opening) + max(map(len, planted.rests)),
        seed=seed,
        wordings=order,
        blocks=blocks,
    )
    return row, *found_and_control(places)


def hidden_each(wordings: Sequence[str], length: int, seed: int) -> Hidden:
    """A sentence of each wording, without names, in the middles of equal parts, and a question for each."""
    alone = [hidden_one(wording, length, depth, seed) for wording, depth in zip(wordings, middles(len(wordings)), strict=True)]
    return Hidden(sum((one.sentences for one in alone), ()), sum((one.questions for one in alone), ()))


def blocks_of(engine: Engine, text: str, opening: list[int], sentence: str) -> range:
    """The blocks that hold tokens of the sentence; opening: the tokens that are read of the text.

    Raises ConfigError when it lies in the text's ends.
    """
    recall, at = engine.config.cache.recall, text.index(sentence)
    begin, end = (common(opening, engine.prompts.whole(text[:n], "")) for n in (at, at + len(sentence)))
    middle = between(recall, len(opening))
    begin, end = max(begin, middle.start), min(end, middle.stop)
    if begin >= end:
        raise ConfigError(
            f"{sentence!r} lies in the first {recall.sinks} or last {recall.recent} of {len(opening)} tokens, which are not ranked; "
            "give a larger --length, or smaller cache.recall.sinks and cache.recall.recent."
        )
    return range((begin - middle.start) // recall.block, (end - 1 - middle.start) // recall.block + 1)


def reciprocal(scores: Tensor, sentences: Sequence[range]) -> Tensor:
    """1 / the place of each sentence's best block: scores (heads, blocks) and the blocks of each sentence -> (heads, sentences)."""
    rows = []
    for of_head in scores:
        place = {block: n for n, block in enumerate(ranked(of_head), 1)}
        rows.append([1 / min(place[block] for block in blocks) for blocks in sentences])
    return torch.tensor(rows, dtype=torch.float64)


def found_and_control(places: Tensor) -> tuple[Tensor, Tensor]:
    """From reciprocal ranks (questions, heads, sentences), question n asking for sentence n: means of the asked for, and of the others."""
    own = places.diagonal(dim1=0, dim2=2)  # (heads, questions)
    num = own.shape[1]
    return own.mean(1), (places.sum((0, 2)) - own.sum(1)) / (num * (num - 1))


def best(heads: Sequence[Judged], count: int) -> list[list[int]]:
    """The heads that gain most, at a tie the earlier, by layer and head. Raises ConfigError when there are fewer."""
    if count > len(heads):
        raise ConfigError(f"--count is {count}, but the model has {len(heads)} heads; ask for as many or fewer.")
    first = sorted(heads, key=lambda one: (-one.gain, one.layer, one.head))[:count]
    return sorted([one.layer, one.head] for one in first)


def judged(engine: Engine, runs: Sequence[tuple[Tensor, Tensor]]) -> list[Judged]:
    """Every head of the model with the means of its found and control, (heads) each, over all runs."""
    found, control = (torch.stack(values).mean(0).tolist() for values in zip(*runs, strict=True))
    names = heads_of(engine.config.cache.recall, engine.model)
    return [Judged(*name, *means) for name, *means in zip(names, found, control, strict=True)]


def _listen(engine: Engine, planted: Planted, sentences: list[range], listener: Listener) -> tuple[Tensor, int]:
    """Read once, hear each question: reciprocal ranks (questions, heads, sentences), and how many blocks there are."""
    reading = engine.read(planted.opening, listener, room=max(map(len, planted.rests)) + ANSWER_TOKENS)
    config, placed, num_blocks = engine.config.cache, [], 0
    for rest in planted.rests:
        with engine.context.recalling():
            asking = heard(config, engine.model, engine.context, reading.cache, rest)
        scores = shares(config.recall, asking, reading.cache, engine.ring)
        placed.append(reciprocal(scores, sentences))
        num_blocks = scores.shape[1]
    return torch.stack(placed), num_blocks
