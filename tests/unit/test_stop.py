"""Stop strings: however the text is cut into tokens, what is written is the text before the first of them, as soon as that is sure."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringctx.runtime.stream import WINDOW, Stream

SIGNS = "abé日\ufffd"
"""Few, so that stop strings occur, overlap and begin in vain; of one to three bytes, and the one for bytes that are no text."""


@dataclass
class Bytes:
    """A tokenizer whose token n is the n-th of these pieces."""

    pieces: list[bytes]

    def decode(self, tokens: list[int], **_: object) -> str:
        return b"".join(self.pieces[token] for token in tokens).decode(errors="replace")


def before_the_first(text: str, stop: list[str]) -> str:
    """The definition: the text up to where the first stop string begins."""
    return text[: min((text.index(one) for one in stop if one in text), default=len(text))]


@st.composite
def cut_texts(draw: st.DrawFn, unit: str = "byte", max_size: int = 30) -> list[bytes]:
    """A text in pieces, cut anywhere, inside characters too, or only between them."""
    text = draw(st.text(SIGNS, max_size=max_size))
    signs = list(text) if unit == "sign" else [text.encode()[n : n + 1] for n in range(len(text.encode()))]
    cuts = sorted(draw(st.lists(st.integers(0, len(signs)))))
    parts = [signs[a:b] for a, b in pairwise([0, *cuts, len(signs)])]
    return [b"".join(sign.encode() if isinstance(sign, str) else sign for sign in part) for part in parts]


STOPS = st.lists(st.text(SIGNS, min_size=1, max_size=4), max_size=3)


@given(cut_texts(), STOPS)
def test_the_answer_is_the_text_before_the_first_stop_string_however_it_is_cut(pieces, stop):
    written: list[str] = []
    stream = Stream(Bytes(pieces), written.append, stop)
    for token in range(len(pieces)):
        stream.push(token)
        if stream.is_stopped:
            break
    whole = b"".join(pieces).decode()
    assert stream.close() == "".join(written) == before_the_first(whole, stop)
    assert all(written)
    assert stream.is_stopped == any(one in whole for one in stop)


@given(cut_texts("sign"), STOPS)
def test_text_waits_only_while_a_stop_string_may_begin_with_it(pieces, stop):
    written: list[str] = []
    stream = Stream(Bytes(pieces), written.append, stop)
    text = ""
    for token, piece in enumerate(pieces):
        stream.push(token)
        text += piece.decode()
        known = text.removesuffix("\ufffd")  # may still become another character
        waiting = known.removeprefix("".join(written))
        assert known == "".join(written) + waiting
        assert stream.is_stopped == any(waiting.startswith(one) for one in stop)
        assert stream.is_stopped or not waiting or any(one.startswith(waiting) for one in stop)
        if stream.is_stopped:
            return


@pytest.mark.parametrize("stop", ["END", "x" * 3 * WINDOW + "END"], ids=["short", "longer-than-the-window"])
def test_a_stop_string_is_found_across_the_window(stop):
    text = "x" * 4 * WINDOW + "END"
    stream = Stream(Bytes([sign.encode() for sign in text]), lambda _: None, [stop])
    for token in range(len(text)):
        assert not stream.is_stopped
        stream.push(token)
    assert stream.is_stopped
    assert stream.close() == text.removesuffix(stop)


@pytest.mark.parametrize(
    ("pieces", "stop", "written"),
    [
        (["a", "b\n", "\nc"], ["\n\n"], ["a", "b"]),
        (["a END b"], ["END"], ["a "]),
        (["aE", "Nd", "E"], ["END"], ["a", "ENd", "E"]),
        (["a", "b", "c", "x"], ["abcd", "bc"], ["a"]),
        (["a", "b", "c", "d"], ["abcd", "bc"], []),
        (["a", "b", "c"], ["abcd", "bc"], ["a"]),
    ],
    ids=["several-tokens", "inside-a-token", "begun-in-vain", "the-longer-fails", "the-longer-began-first", "the-longer-never-ends"],
)
def test_what_is_written_and_when(pieces, stop, written):
    said: list[str] = []
    stream = Stream(Bytes([piece.encode() for piece in pieces]), said.append, stop)
    for token in range(len(pieces)):
        stream.push(token)
    stream.close()
    assert said == written
