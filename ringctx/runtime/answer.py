"""Answer: what is told while a document is read and a question is answered, and what is reported when it is done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Where the time went. first_token counts from the document's text to the first token."""

    load: float
    prefill: float
    first_token: float
    decode: float


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What `ringctx generate --json` prints; the keys are pinned by a test.

    tokens: the answer's token ids, those of the stop string or the end of text included. bytes: sent by all ranks, by kind.
    memory: peak bytes of each rank.
    """

    answer: str
    tokens: list[int]
    prompt_tokens: int
    ranks: int
    seconds: Seconds
    tokens_per_second: dict[str, float]
    bytes: dict[str, int]
    memory: list[int]

    def json(self) -> dict[str, Any]:
        """As plain lists and mappings."""
        return asdict(self)


def _nothing(*_: Any) -> None:
    pass


@dataclass(kw_only=True)
class Listener:
    """Who wants to know how it goes.

    `began(tokens, chunks)` when so many more tokens are going to be read, `layer(number)` while they are, `prefilled()` when all are,
    `text(piece)` of the answer. `is_gone()` is asked on rank 0 before each chunk and each token: once it is true, every rank breaks
    off with `Abandoned`.
    """

    began: Callable[[int, int], None] = _nothing
    layer: Callable[[int], None] = _nothing
    prefilled: Callable[[], None] = _nothing
    text: Callable[[str], None] = _nothing
    is_gone: Callable[[], bool] = lambda: False


class Abandoned(Exception):
    """Nobody waits for the answer any more. All ranks raise it at the same place, and the ring is whole."""


@dataclass(frozen=True, kw_only=True)
class Folders:
    """Where what is read is kept while it is read (save), and where what was read before lies (resume); they may be the same."""

    save: Path | None = None
    resume: Path | None = None
