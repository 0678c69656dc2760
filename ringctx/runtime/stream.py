"""Stream: tokens to text as they come, never half a character."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

HALF = "\ufffd"
"""What a tokenizer says for bytes that are no character, or not yet one: only the last of them may still become one."""
WINDOW, CONTEXT = 64, 8
"""Tokens decoded together at most, and those kept before new ones, since a token's text may depend on its neighbours."""


class Stream:
    """Feed it tokens; it calls `write` with the text that they add. The pieces together are the answer."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        self._tokenizer, self._write = tokenizer, write
        self._tokens: list[int] = []
        self._written = 0  # characters of the window's text
        self._pieces: list[str] = []

    def push(self, token: int) -> None:
        """A token more. A last character that is not whole yet waits for the next token."""
        self._tokens.append(token)
        self._flush(_whole(self._text()))
        if len(self._tokens) > WINDOW:
            self._tokens = self._tokens[-CONTEXT:]
            self._written = len(_whole(self._text()))

    def close(self) -> str:
        """Write what is still waiting; returns the whole answer."""
        self._flush(self._text())
        return "".join(self._pieces)

    def _text(self) -> str:
        """The window's tokens as text, special ones left out."""
        return str(self._tokenizer.decode(self._tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _flush(self, text: str) -> None:
        if len(text) > self._written:
            self._pieces.append(text[self._written :])
            self._written = len(text)
            self._write(self._pieces[-1])


def _whole(text: str) -> str:
    """The text without a last character that may not be whole."""
    return text.removesuffix(HALF)
