"""Stream: tokens to text as they come, never half a character."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Stream:
    """Feed it tokens; it calls `write` with the text that they add. The pieces together are the answer."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        self._tokenizer, self._write = tokenizer, write
        self._tokens: list[int] = []
        self._written = 0

    def push(self, token: int) -> None:
        """A token more. Text whose last character is not whole yet waits for the next token."""
        self._tokens.append(token)
        text = self.text()
        if not text.endswith("\ufffd"):
            self._flush(text)

    def close(self) -> str:
        """Write what is still waiting; returns the whole answer."""
        text = self.text()
        self._flush(text)
        return text

    def text(self) -> str:
        """All tokens so far as text, special ones left out."""
        return str(self._tokenizer.decode(self._tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _flush(self, text: str) -> None:
        if len(text) > self._written:
            self._write(text[self._written :])
            self._written = len(text)
