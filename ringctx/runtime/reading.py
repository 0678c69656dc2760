"""Reading: what was read once, and is asked any number of times."""

from __future__ import annotations

from dataclasses import dataclass

from ringctx.runtime.cache import KVCache

QUESTION_ROOM = 1_024
"""Tokens that a question may take where nobody says; longer ones work, but memory grows for them."""


@dataclass
class Reading:
    """Tokens that were read, with their keys in this rank's cache: what any number of answers go on from.

    length: tokens of the sequence for which positions are turned, the question's and the answer's included.
    num_resumed: how many of the tokens a snapshot held, so that they were not read. seconds: what reading the others took.
    """

    tokens: list[int]
    cache: KVCache
    length: int
    num_resumed: int = 0
    seconds: float = 0.0
