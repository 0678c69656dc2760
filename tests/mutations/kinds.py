"""What a mutation is, and short ways to name the tests that must notice it."""

from __future__ import annotations

from dataclasses import dataclass

PROMISES = "tests/ranks/test_promises.py::"


@dataclass(frozen=True)
class Mutation:
    """One break: in this file, `old` becomes `new`; `tests` are pytest's node ids that must notice."""

    name: str
    file: str
    old: str
    new: str
    story: str
    tests: tuple[str, ...]


def exact(*names: str) -> tuple[str, ...]:
    """Cases of forward and backward against the definition."""
    return tuple(f"{PROMISES}test_forward_and_backward_are_the_definition[{name}]" for name in names)


def promise(*names: str) -> tuple[str, ...]:
    """Other tests of the promises."""
    return tuple(PROMISES + name for name in names)


def unit(file: str, *names: str) -> tuple[str, ...]:
    """Tests of tests/unit."""
    return tuple(f"tests/unit/test_{file}.py::{name}" for name in names)


CORE = "ringctx/core/"
