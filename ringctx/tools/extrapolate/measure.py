"""Measure: train each model that is not there yet, then let every method predict the same tokens from more and more context.

Of each held-out window of the longest length, the last n tokens are predicted, n being the trained length, from the L - n before them
and each other: the labels of all lengths and methods are the same. Passkeys lie anywhere in L tokens and are asked for at the end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ringctx import config as configuration
from ringctx.config import Config
from ringctx.core.ring import Ring
from ringctx.errors import ConfigError
from ringctx.tools.extrapolate.methods import BASELINE, METHODS, reading_block, trained_block
from ringctx.training import loop, passkey, text
from ringctx.training.data import HELD_OUT_SEED, Pairs, Text, data_of
from ringctx.training.labels import IGNORED, shifted
from ringctx.training.measure import held_out
from ringctx.training.model import job_of


@dataclass(frozen=True)
class Asked:
    """method: names of METHODS, all where there are none. length: tokens tested. seed: of models. windows: held-out ones of each length."""

    method: tuple[str, ...] = ()
    length: tuple[int, ...] = ()
    seed: tuple[int, ...] = (0,)
    windows: int = 32

    @property
    def methods(self) -> tuple[str, ...]:
        """In the order of METHODS, the baseline among them."""
        return tuple(name for name in METHODS if name in (self.method or METHODS) or name == BASELINE)


@dataclass(frozen=True)
class Row:
    """loss: mean -log p of the same tokens at every length. digits: the share of passkeys' digits that are the likeliest token."""

    method: str
    seed: int
    length: int
    loss: float
    digits: float | None


@dataclass(frozen=True)
class Result:
    """trained: tokens of training. rows: by method, seed and length."""

    trained: int
    windows: int
    rows: tuple[Row, ...]

    def json(self) -> dict[str, Any]:
        """What `--json` prints."""
        return dataclasses.asdict(self)


def check(config: Config, asked: Asked) -> Asked:
    """What is asked, with lengths. Raises ConfigError for what cannot be trained or tested."""
    training = config.training
    if training.data != "text" or not training.scratch.layers:
        raise ConfigError("`ringctx extrapolate` trains small models on text; set training.scratch.layers, and training.data to text.")
    unknown = [name for name in asked.method if name not in METHODS]
    if unknown:
        raise ConfigError(f"There is no method {unknown[0]!r}; there are {', '.join(METHODS)}.")
    if min(asked.length, default=training.context) < training.context:
        raise ConfigError(f"A length of {min(asked.length)} was asked, and models are trained on {training.context}; give that or more.")
    loop.check(config)
    return dataclasses.replace(asked, length=asked.length or tuple(training.context * 2**n for n in range(5)))


def measure(config: Config, ring: Ring, asked: Asked, after_row: Callable[[Row], None] = lambda row: None) -> Result:
    """All ranks call it together. Models lie in training.out, a folder each, and are trained on from where they are."""
    models = {
        (name, seed): _trained(config, ring, name, seed)
        for name in dict.fromkeys(METHODS[one].trained for one in asked.methods)
        for seed in asked.seed
    }
    data = data_of(config.training, Path(config.training.out) / "any", None)  # the text lies beside the models' folders
    assert isinstance(data, Text)
    rows = []
    for length, (ids, hidden) in _tests(config, data, asked):
        for name in asked.methods:
            for seed in asked.seed:
                path = models[METHODS[name].trained, seed]
                job = job_of(_tested(config, name, length, path), ring, None)
                digits = None if hidden is None else held_out(job, hidden).exact
                rows.append(Row(name, seed, length, held_out(job, ids).loss, digits))
                after_row(rows[-1])
    order = {name: n for n, name in enumerate(METHODS)}
    return Result(config.training.context, asked.windows, tuple(sorted(rows, key=lambda row: (order[row.method], row.seed, row.length))))


def _trained(config: Config, ring: Ring, name: str, seed: int) -> str:
    """The checkpoint of a model, trained now where it was not."""
    training = config.training
    block = trained_block(name, training.context, training.scratch.layers)
    out = Path(training.out) / f"{name}-{seed}"
    asked = dataclasses.replace(_attending(config, block), training=dataclasses.replace(training, seed=seed, out=str(out)))
    done: str = loop.train(asked, ring)["checkpoint"]
    return done


def _tested(config: Config, name: str, length: int, path: str) -> Config:
    training = config.training
    block = reading_block(name, training.context, training.scratch.layers, length)
    model = dataclasses.replace(config.model, path=path)
    none = dataclasses.replace(training.scratch, layers=0)
    return dataclasses.replace(_attending(config, block), model=model, training=dataclasses.replace(training, context=length, scratch=none))


def _attending(config: Config, block: str) -> Config:
    return dataclasses.replace(config, attention=configuration.parse(f"attention: {block}").attention)


def _tests(config: Config, data: Text, asked: Asked) -> Iterator[tuple[int, tuple[Pairs, Pairs | None]]]:
    """Per length, text with the labels of its last n tokens, and passkeys where models were trained on some."""
    n, longest = config.training.context, max(asked.length)
    windows = text.windows(data.corpus.held_out, asked.windows, longest + 1, None)
    for length in asked.length:
        ids, labels = shifted(windows[:, longest - length :])
        labels = labels.clone()
        labels[:, : length - n] = IGNORED
        hidden = None
        if config.training.passkeys:
            planted, answers = passkey.plant(windows[:, longest - length :], data.tokenizer, HELD_OUT_SEED + length)
            hidden = shifted(planted)[0], planted.where(answers, planted.new_full((), IGNORED))[:, 1:]
        yield length, ((ids, labels), hidden)


def mean_of(rows: Sequence[Row], method: str, length: int, of: str) -> tuple[float, float] | None:
    """The mean over seeds, and the distance between the least and the greatest; None where nothing was measured."""
    values = [getattr(row, of) for row in rows if (row.method, row.length) == (method, length) and getattr(row, of) is not None]
    return (sum(values) / len(values), max(values) - min(values)) if values else None
