"""Data: what a step learns from and what is held out, by the configuration. The same on every rank, by seed and step alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ringctx.config_training import TrainingConfig
from ringctx.training import passkey, text, variables
from ringctx.training.labels import shifted

Pairs = tuple[Tensor, Tensor]
"""ids and labels (b S), labels shifted."""
HELD_OUT_SEED = 2**40
"""Far from the seeds of steps."""


class Data(Protocol):
    """What both kinds of data are to the loop."""

    @property
    def tokenizer(self) -> Any:
        """What turns text into these tokens."""

    def batch(self, step: int) -> Pairs:
        """The sequences of a step."""

    def held_out(self) -> dict[int, Pairs]:
        """Held-out sequences by their length in tokens, `context` first."""


@dataclass(frozen=True)
class Text:
    """Windows of a long line of tokens."""

    config: TrainingConfig
    corpus: text.Corpus

    @property
    def tokenizer(self) -> Any:
        """That of the corpus."""
        return self.corpus.tokenizer

    def batch(self, step: int) -> Pairs:
        """Windows drawn anew at each step."""
        seed, config = self.config.seed * 1_000_003 + step, self.config
        drawn, hiding = text.windows(self.corpus.train, config.batch, config.context + 1, seed), round(config.passkeys * config.batch)
        if hiding:
            drawn[:hiding], _ = passkey.plant(drawn[:hiding], self.tokenizer, seed)
        return shifted(drawn)

    def held_out(self) -> dict[int, Pairs]:
        """The first windows of what is held out."""
        return {self.config.context: shifted(text.windows(self.corpus.held_out, self.config.held_out, self.config.context + 1, None))}


@dataclass(frozen=True)
class Variables:
    """Texts of the task, drawn as they are needed."""

    config: TrainingConfig

    @property
    def tokenizer(self) -> Any:
        """One of the task's words."""
        return words(variables.vocabulary(self.config.variables))

    def batch(self, step: int) -> Pairs:
        """New texts at each step."""
        task, seed = self.config.variables, self.config.seed * 1_000_003 + step
        return variables.draw(task, self.config.batch, self.config.context, seed)

    def held_out(self) -> dict[int, Pairs]:
        """Texts as long as those of training, and longer."""
        task, lengths = self.config.variables, [self.config.context * n for n in (1, *self.config.variables.longer)]
        return {length: variables.draw(task, self.config.held_out, length, HELD_OUT_SEED + length) for length in lengths}


def data_of(config: TrainingConfig, out: Path, tokenizer: Any | None) -> Data:
    """The data of a configuration. tokenizer: of the model that is trained on, None where the data make one."""
    if config.data == "variables":
        return Variables(config)
    if tokenizer is None:
        return Text(config, text.corpus(out.parent, config.scratch.vocabulary))
    return Text(config, text.corpus_by(tokenizer))


def words(vocabulary: list[str]) -> Any:
    """A tokenizer whose tokens are these words, with spaces between."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({word: n for n, word in enumerate(vocabulary)}, unk_token=vocabulary[0]))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token=vocabulary[0], eos_token=vocabulary[0])
