"""Asked: what an evaluation is to measure, refused here where it makes no sense. Knows nothing of models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ringctx.errors import ConfigError
from ringctx.tools.eval.wordings import NAMES, WORDINGS

TASKS = {
    "needle": ("depth", "seed", "wording"),
    "needles": ("depth", "seed", "wording", "count"),
    "variables": ("seed", "count", "hops"),
    "perplexity": ("stride", "tokens"),
    "heads": ("seed", "wording", "count"),
    "budgets": ("policy", "budget"),
    "search": ("budget", "stride", "rise"),
}
"""What each task may be told beside --length."""
SHIPPED = Path(__file__).parents[3] / "launch" / "documents" / "kjv.txt.gz"
"""The text that is read where none is named."""
COUNT = 4
"""Needles or variables where nobody says."""
HEADS = 8
"""Heads where nobody says."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One evaluation: the task, its text, its lengths in tokens, and what else was said; () and None where nothing was.

    depth: where a needle lies, 0 first, 1 last; of needles, where each of them does, the middles of equal parts by default.
    seed: of what is drawn. wording: names in WORDINGS. count: of needles, of variables, or of heads to choose. hops: from a
    variable's number to the one asked for. stride: tokens that each window of a perplexity adds. tokens: of the text that those
    windows slide over. policy: who chooses which keys are kept, budget: how many (of search, to begin with); of search, stride: keys
    that a cut takes, rise: of the loss, where it ends.
    """

    task: str
    text: str
    length: tuple[int, ...]
    depth: tuple[float, ...] = ()
    seed: tuple[int, ...] = ()
    wording: tuple[str, ...] = ()
    count: int | None = None
    hops: int | None = None
    stride: int | None = None
    tokens: int | None = None
    policy: tuple[str, ...] = ()
    budget: tuple[int, ...] = ()
    rise: float | None = None

    def __post_init__(self) -> None:
        if not self.length:
            raise ConfigError(f"`ringctx eval --task {self.task}` needs --length N: how many tokens to read.")
        for option in ("depth", "seed", "wording", "count", "hops", "stride", "tokens", "policy", "budget", "rise"):
            if getattr(self, option) not in ((), None) and option not in TASKS[self.task]:
                others = " or ".join(f"--task {task}" for task, options in TASKS.items() if option in options)
                raise ConfigError(f"--{option} means nothing to --task {self.task}; leave --{option} out, or ask for {others}.")
        if self.task == "needle" and not self.depth:
            raise ConfigError("`ringctx eval --task needle` needs --depth D, from 0 to 1: where the needle lies; it may be repeated.")
        for option, least, most in (("count", 1, len(NAMES)), ("hops", 0, len(NAMES))):
            given = getattr(self, option)
            if given is not None and not least <= given <= most:
                raise ConfigError(f"--{option} is {given}; it may be {least} to {most}.")
        if self.task == "needles" and self.depth and self.count not in (None, len(self.depth)):
            raise ConfigError(f"--count {self.count} needles and {len(self.depth)} --depth do not fit; give one of the two.")
        unknown = set(self.wording) - set(WORDINGS)
        if unknown:
            raise ConfigError(f"--wording {min(unknown)} is not known; there are {', '.join(WORDINGS)}.")
        if self.task == "heads" and len(set(self.wording)) == 1:
            raise ConfigError(
                f"--task heads compares a sentence's own question with those of others, and --wording {self.wording[0]} is but one; "
                "give two or more, or none for all."
            )
        if self.task == "perplexity":
            self._check_windows()
        if self.task in ("budgets", "search") and min(self.budget, default=2) < 2:
            raise ConfigError(f"--budget is {min(self.budget)}; a query sees itself and another key at least: 2 or more.")
        if self.task == "budgets" and not self.budget and set(self.policy) != {"whole"}:
            raise ConfigError("`ringctx eval --task budgets` needs --budget N, how many keys are kept; it may be repeated.")
        if self.task == "search" and (len(self.budget) > 1 or len(self.length) > 1):
            raise ConfigError("`ringctx eval --task search` begins with one --budget and sequences of one --length; give one of each.")

    def _check_windows(self) -> None:
        if (self.stride is None) != (self.tokens is None):
            raise ConfigError(
                "Perplexity through windows needs both --stride S, how many tokens each window adds, and --tokens N, how many of the "
                "text they slide over; give both, or neither for one pass."
            )
        if self.stride is None or self.tokens is None:
            if len(self.length) > 1:
                raise ConfigError(
                    "Perplexity is one pass over the first --length tokens, with a row for each power of two; give one --length, "
                    "or --stride and --tokens for a window of each."
                )
            return
        if not 1 <= self.stride < min(self.length):
            raise ConfigError(f"--stride is {self.stride}; it may be 1 to {min(self.length) - 1}, so that windows of --length overlap.")
        if self.tokens < max(self.length):
            raise ConfigError(f"--tokens is {self.tokens}, but a window has {max(self.length)}; slide over at least as many.")


@dataclass(frozen=True, kw_only=True)
class Row:
    """What every task says of a run; the first six keys are a contract.

    length: tokens. depth, correct: of what was hidden, else None. seconds: prefill_seconds, reading text and questions, and
    answer_seconds, writing answers (None where there are none). density: query-key pairs that the patterns allow, as a share of
    causal attention's, over the tokens read, the mean of all layers and heads. bytes: sent by all ranks.
    memory: each rank's peak in bytes up to now, so it never falls from one run to the next. anonymous: the most anonymous
    memory seen of each rank's process during the run, looked at every 10 ms; cache files are not in it; None but on Linux.
    """

    length: int
    depth: float | None
    correct: bool | None
    seconds: float
    density: float
    bytes: int
    prefill_seconds: float
    answer_seconds: float | None
    memory: list[int]
    anonymous: list[int | None]

    @property
    def tried(self) -> list[tuple[float | None, bool]]:
        """Depth and success of each thing that was asked for in this run."""
        return [] if self.correct is None else [(self.depth, self.correct)]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What `ringctx eval --json` prints. accuracy: the share of what was asked that was answered rightly, None where nothing was."""

    task: str
    rows: Sequence[Row]
    protocol: str

    @property
    def accuracy(self) -> float | None:
        """All questions of all rows count alike."""
        tried = [is_correct for row in self.rows for _, is_correct in row.tried]
        return sum(tried) / len(tried) if tried else None

    def json(self) -> dict[str, Any]:
        """As plain lists and mappings; the keys are pinned by a test."""
        return {"task": self.task, "rows": [asdict(row) for row in self.rows], "accuracy": self.accuracy, "protocol": self.protocol}
