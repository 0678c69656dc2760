"""Stream: tokens to text as they come, never half a character and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

HALF = "\ufffd"
"""What a tokenizer says for bytes that are no character, or not yet one: only the last of them may still become one."""
WINDOW, CONTEXT = 64, 8
"""Tokens decoded together at most, and those kept before new ones, since a token's text may depend on its neighbours."""


class Stream:
    """Feed it tokens; it calls `write` with the text that they add. The pieces together are the answer.

    The answer ends just before the first place where one of the `stop` strings begins; then `is_stopped` is True, and what
    else comes is left out. Text with which a stop string may begin waits until it is clear that none does.
    """

    def __init__(self, tokenizer: Any, write: Callable[[str], None], stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._write, self._stop = tokenizer, write, tuple(stop)
        self.is_stopped = False
        self._tokens: list[int] = []
        self._taken = 0  # characters of the window's text
        self._waiting = ""  # a stop string may begin with it
        self._pieces: list[str] = []

    def push(self, token: int) -> None:
        """A token more. A last character that is not whole yet waits for the next token."""
        self._tokens.append(token)
        self._flush(_whole(self._text()))
        if len(self._tokens) > WINDOW:
            self._tokens = self._tokens[-CONTEXT:]
            self._taken = len(_whole(self._text()))

    def close(self) -> str:
        """Write what is still waiting; returns the whole answer."""
        self._flush(self._text(), is_last=True)
        return "".join(self._pieces)

    def _text(self) -> str:
        """The window's tokens as text, special ones left out."""
        return str(self._tokenizer.decode(self._tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _flush(self, text: str, *, is_last: bool = False) -> None:
        """Write what is new in the window's text and can be no part of a stop string."""
        waiting = self._waiting + text[self._taken :]
        self._taken = max(self._taken, len(text))
        end, self.is_stopped = _end(waiting, self._stop, is_last)
        self._waiting = waiting[end:]
        if end:
            self._pieces.append(waiting[:end])
            self._write(self._pieces[-1])


def _end(text: str, stop: tuple[str, ...], is_last: bool) -> tuple[int, bool]:
    """The first place where a stop string begins, or may begin if this is not the last of the text; True if one is there whole."""
    for place in range(len(text)):
        if text.startswith(stop, place):
            return place, True
        rest = text[place:]
        if not is_last and any(one.startswith(rest) for one in stop):
            return place, False
    return len(text), False


def _whole(text: str) -> str:
    """The text without a last character that may not be whole."""
    return text.removesuffix(HALF)
