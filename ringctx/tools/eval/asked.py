"""Asked: what an evaluation is to measure, refused here where it makes no sense. Knows nothing of models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ringctx.errors import ConfigError

TASKS = ("needle", "perplexity")
SHIPPED = Path(__file__).parents[3] / "launch" / "documents" / "kjv.txt.gz"
"""The text that is read where none is named."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One evaluation: the task, its lengths in tokens, a needle's depths (0 first, 1 last), the text, and the seed of what is drawn."""

    task: str
    text: str
    lengths: tuple[int, ...]
    depths: tuple[float, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.lengths:
            raise ConfigError(f"`ringctx eval --task {self.task}` needs --length N: how many tokens to read.")
        if self.task == "needle" and not self.depths:
            raise ConfigError("`ringctx eval --task needle` needs --depth D, from 0 to 1: where the needle lies; it may be repeated.")
        if self.task == "perplexity" and self.depths:
            raise ConfigError("Perplexity is not measured at a depth; leave --depth out, or ask for --task needle.")
        if self.task == "perplexity" and len(self.lengths) > 1:
            raise ConfigError("Perplexity is one pass over the first --length tokens, with a row for each power of two; give one --length.")


@dataclass(frozen=True, kw_only=True)
class Row:
    """What every task says of a run; the keys are a contract.

    length: tokens. depth, correct: of a needle, else None. density: query-key pairs that the patterns allow, as a share of
    causal attention's, over the tokens read, the mean of all layers and heads. bytes: sent by all ranks.
    """

    length: int
    depth: float | None
    correct: bool | None
    seconds: float
    density: float
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Result:
    """What `ringctx eval --json` prints. accuracy: the share of rows that are correct, None where no row can be."""

    task: str
    rows: Sequence[Row]
    accuracy: float | None
    protocol: str

    def json(self) -> dict[str, Any]:
        """As plain lists and mappings; the keys are pinned by a test."""
        return {"task": self.task, "rows": [asdict(row) for row in self.rows], "accuracy": self.accuracy, "protocol": self.protocol}
