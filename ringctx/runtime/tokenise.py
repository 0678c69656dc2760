"""Tokens of a text of any length in bounded memory: piece by piece, and the same as in one go.

A fast tokenizer holds half a kilobyte a token while it works. Pieces overlap, and are joined in the midst of the overlap, where
both cut the text alike. Knows the tokenizer. Knows nothing of models or ranks.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import takewhile
from typing import Any, NamedTuple

PIECE = 200_000
"""Characters a piece."""
REACH = 2_000
"""Characters that a piece reads on both sides of its own; tokens that far from a cut do not know of it."""


class Piece(NamedTuple):
    """Tokens of a part of the text, and the character of the whole at which each begins."""

    tokens: list[int]
    starts: list[int]


def tokenise(tokenizer: Any, text: str, *, special: bool = False) -> list[int]:
    """The tokens of the text, and of those that the tokenizer puts around a text where `special` asks for them.

    A text that pieces do not cut alike, such as one letter a million times, is tokenised in one go, and so it is by a slow tokenizer.
    """
    if len(text) <= PIECE + REACH or not tokenizer.is_fast:
        return list(tokenizer(text, add_special_tokens=special, verbose=False).input_ids)
    tokens: list[int] = []
    piece, begin = _piece(tokenizer, text, 0), 0
    for seam in range(PIECE, len(text), PIECE):
        later = _piece(tokenizer, text, seam)
        found = _joint(piece, later, seam)
        if found is None:
            return list(tokenizer(text, add_special_tokens=special, verbose=False).input_ids)
        tokens += piece.tokens[begin : found[0]]
        piece, begin = later, found[1]
    before, after = _around(tokenizer, text[:REACH]) if special else ([], [])
    return [*before, *tokens, *piece.tokens[begin:], *after]


def _piece(tokenizer: Any, text: str, seam: int) -> Piece:
    """The piece whose own characters begin at the seam."""
    first = max(seam - REACH, 0)
    read = tokenizer(text[first : seam + PIECE + REACH], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return Piece(list(read.input_ids), [first + start for start, _ in read.offset_mapping])


def _joint(left: Piece, right: Piece, seam: int) -> tuple[int, int] | None:
    """The first token at or after the seam from which both agree for half their reach, by its number in each; None if there is none."""
    first, last = (bisect_left(left.starts, seam + shift) for shift in (0, REACH // 2))
    for here in range(first, last):
        start = left.starts[here]
        there = bisect_left(right.starts, start)
        size = bisect_left(left.starts, start + REACH // 2) - here
        same = (a[here : here + size] == b[there : there + size] for a, b in zip(left, right, strict=True))
        if left.starts[here - 1] < start and all(same):
            return here, there
    return None


def _around(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """The tokens that this tokenizer puts before and after any text."""
    read = tokenizer(text, add_special_tokens=True, return_special_tokens_mask=True)
    added, tokens = read.special_tokens_mask, list(read.input_ids)
    before, after = (len(list(takewhile(bool, mask))) for mask in (added, reversed(added)))
    return tokens[:before], tokens[len(tokens) - after :]
